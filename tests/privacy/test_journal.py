"""What a journal has noted outlives the process, a power cut, and the session's identifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from wsfed.privacy.cohorts import Unmasked
from wsfed.privacy.journal import Journal

SESSION = b"x" * 16
SUM = Unmasked("clinics", 1, "points", b"\x01" * 32, frozenset(["alice", "bob", "carol"]))


def _all(earlier: Sequence[Unmasked]) -> None:
    """Nothing is refused."""


def _sums(journal: Journal) -> list[Unmasked]:
    seen: list[Unmasked] = []
    journal.check(seen.extend)
    return seen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "alice.journal"


def test_rounds_outlive_the_process(path: Path) -> None:
    journal = Journal(path)
    assert journal.last(SESSION) == (0, -1)
    journal.write(SESSION, 3, 1, (9, 60))
    assert Journal(path).last(SESSION) == (3, 1)
    journal.write(SESSION, 3, 2**32 - 1)
    assert Journal(path).last(SESSION) == (3, 2**32 - 1)
    with pytest.raises(ValueError, match="or a later one"):
        Journal(path).write(SESSION, 3, 2)


def test_sums_outlive_the_process(path: Path) -> None:
    journal, other = Journal(path), Unmasked("clinics", 2, "points", b"\x02" * 32, SUM.members)
    third = Unmasked("clinics", 2, "scans", b"\x02" * 32, frozenset(["alice", "bob", "dave"]))
    for each in (SUM, other, third):
        journal.unmask(each, _all)
    assert _sums(Journal(path)) == _sums(journal) == [SUM, other, third]
    assert path.read_bytes().count(b"carol") == 1  # a group is written once


def test_the_rate_outlives_the_process_and_counts_every_session(path: Path) -> None:
    now = 1000.0

    def clock() -> float:
        return now

    for number in range(3):
        journal = Journal(path, clock)
        journal.check_rate(3, 60)
        journal.write(bytes([number]) * 16, 1, 0, (3, 60))
        now += 10
    journal = Journal(path, clock)
    with pytest.raises(ValueError, match="3 rounds in 60 s already"):
        journal.check_rate(3, 60)
    with pytest.raises(ValueError, match="3 rounds in 60 s already"):
        journal.write(SESSION, 1, 0, (3, 60))
    assert journal.last(SESSION) == (0, -1)
    now = 1060.0  # the first one was a minute ago
    journal.write(SESSION, 1, 0, (3, 60))
    with pytest.raises(ValueError, match="3 rounds"):
        journal.check_rate(3, 60)


def test_the_end_of_a_round_does_not_count_as_another(path: Path) -> None:
    journal = Journal(path)
    journal.write(SESSION, 1, 0, (2, 60))
    journal.write(SESSION, 1, 2**32 - 1)
    journal.check_rate(2, 60)


def test_a_clock_that_was_set_back_gives_no_rounds_for_nothing(path: Path) -> None:
    now = 1000.0
    journal = Journal(path, lambda: now)
    journal.write(SESSION, 1, 0, (1, 60))
    now = 10.0
    with pytest.raises(ValueError, match="1 rounds"):
        journal.check_rate(1, 60)


def test_a_line_that_was_not_written_to_its_end_is_overwritten(path: Path) -> None:
    journal = Journal(path)
    journal.write(SESSION, 1, 0, (9, 60))
    journal.write(SESSION, 2, 0, (9, 60))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = Journal(path)
        kept = whole[:cut].count(b"\n")
        assert again.last(SESSION) == ((kept - 1, 0) if kept > 1 else (0, -1))
        again.write(SESSION, 7, 0, (9, 60))
        assert Journal(path).last(SESSION) == (7, 0), cut


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{}\n",
        "x",
        '["wsfed-journal/2"]\n',
        '["wsfed-journal/1"]\n["mask","00",1]\n',
        '["wsfed-journal/1"]\n["else"]\n',
        '["wsfed-journal/1"]\n["sum","r",1,"d","00",0]\n',
        '["wsfed-journal/1"]\n5\n',
    ],
)
def test_what_is_no_journal_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match="no journal"):
        Journal(path)
    assert path.read_text() == text


def test_what_could_not_be_written_is_not_taken_for_noted(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "missing" / "alice.journal")
    with pytest.raises(OSError, match="missing"):
        journal.write(SESSION, 1, 0, (9, 60))
    with pytest.raises(OSError, match="missing"):
        journal.unmask(SUM, _all)
    assert journal.last(SESSION) == (0, -1)
    assert not _sums(journal)
