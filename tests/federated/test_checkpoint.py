"""What was saved is there whole, or the one before is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wsfed
from wsfed.federated import Checkpoint, Round, SiteRound
from wsfed.federated.checkpoint import Saved


def round_of(number: int) -> Round:
    return Round(number, 0.5, {"accuracy": 0.1}, 1.0, (SiteRound("bob", loss=0.5),))


def saved(rounds: int) -> Saved:
    row = torch.arange(4.0)
    return Saved(
        {"weight": row.view(2, 2).t(), "count": torch.tensor(rounds), "half": torch.ones(1).half()},
        {"c of bob/weight": row[:2], "momentum": row},  # shares memory
        [round_of(number + 1) for number in range(rounds)],
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "new" / "folder")
    checkpoint.save(saved(3), {"seed": 1})
    loaded = checkpoint.load({"seed": 1})
    assert loaded is not None
    assert loaded.rounds == saved(3).rounds
    for mine, theirs in ((loaded.state, saved(3).state), (loaded.memory, saved(3).memory)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())
        assert all(mine[name].dtype == value.dtype for name, value in theirs.items())


def test_an_empty_folder_holds_none(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "none").load({}) is None
    (tmp_path / "notes.txt").write_text("x")
    assert Checkpoint(tmp_path).load({}) is None


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, keep=2)
    for rounds in (1, 2, 3, 4):
        checkpoint.save(saved(rounds), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-000003.safetensors",
        "round-000004.safetensors",
    ]


def test_a_crash_while_it_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(saved(1), {})

    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved(2), {})
    loaded = checkpoint.load({})
    assert loaded is not None
    assert len(loaded.rounds) == 1


def test_what_is_damaged_is_told(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    path = checkpoint.save(saved(1), {})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(wsfed.FederatedError, match="damaged"):
        checkpoint.load({})
    path.write_bytes(b"")
    with pytest.raises(wsfed.FederatedError, match="damaged"):
        checkpoint.load({})


def test_other_settings_are_told(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(saved(1), {"seed": 1, "strategy": "FedAvg"})
    with pytest.raises(wsfed.FederatedError, match="'FedAvg' then, 'Krum' now"):
        checkpoint.load({"seed": 1, "strategy": "Krum"})


@pytest.mark.parametrize("more", [{"every": 0}, {"keep": 0}])
def test_what_makes_no_sense_is_refused(tmp_path: Path, more: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoint(tmp_path, **more)
