"""What a member has given away, on disk: it never takes part twice, restarted or not.

A file of lines, each a JSON list, which only grows; a line is on the disk before what it tells of
leaves. A last line that was not written to its end tells of nothing that has left.

==========  =================================================================================
line        is written before
==========  =================================================================================
``mask``    a masked vector is given: session, round, attempt, seconds since 1970
``cohort``  the first sum over these members: their names; cohorts are numbered from 0
``sum``     shares for a sum are given: roster, epoch, data set, model, number of the cohort
``last``    shares are given: session, round, and that no other attempt at it follows
==========  =================================================================================
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from wsfed.privacy.cohorts import Unmasked

__all__ = ["Journal"]

_FORM: Final = ["wsfed-journal/1"]
#: Takes the sums that shares were given for; raises ValueError where the next one is too much.
_Check: TypeAlias = Callable[[Sequence[Unmasked]], None]


class Journal:
    """The rounds in which a member took part, and the sums that it has helped to unmask.

    Args:
        path: of a file, which is made if it is not there; ``None`` to forget with the process.
        clock: tells seconds since 1970.

    Raises:
        ValueError: the file is no journal.
        OSError: it cannot be read.
    """

    def __init__(
        self, path: str | Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self._clock = None if path is None else Path(path), clock
        self._lock = threading.Lock()
        self._last: dict[str, tuple[int, int]] = {}
        self._begun: list[float] = []
        self._cohorts: list[frozenset[str]] = []
        self._numbers: dict[frozenset[str], int] = {}
        self._sums: list[Unmasked] = []
        self._end = 0  # bytes of the file, without a line that was not written to its end
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        told = path.read_bytes()
        self._end = told.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in told[: self._end].splitlines()]
            if told and lines[:1] != [_FORM] and not _form().startswith(told):
                raise ValueError(f"it does not begin with {_FORM[0]}")
            for kind, *rest in lines[1:]:
                self._learn(kind, rest)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no journal: {error}") from None

    def _learn(self, kind: str, told: Sequence[Any]) -> None:
        match kind, told:
            case "mask", [str(session), int(round), int(attempt), int() | float() as at]:
                self._last[session] = (round, attempt)
                self._begun.append(float(at))
            case "last", [str(session), int(round), int(attempt)]:
                self._last[session] = (round, attempt)
            case "cohort", [list(names)]:
                self._cohorts.append(frozenset(map(str, names)))
                self._numbers[self._cohorts[-1]] = len(self._cohorts) - 1
            case "sum", [str(roster), int(epoch), str(dataset), str(model), int(number)]:
                model_hash, members = bytes.fromhex(model), self._cohorts[number]
                self._sums.append(Unmasked(roster, epoch, dataset, model_hash, members))
            case _:
                raise ValueError(f"a line of another kind: {str(kind)[:20]!r}")

    def last(self, session: bytes) -> tuple[int, int]:
        """Round and attempt, ``(0, -1)`` for a session that is new."""
        with self._lock:
            return self._last.get(session.hex(), (0, -1))

    def check_rate(self, rounds: int, seconds: float) -> None:
        """Whether another round may begin, of whatever session.

        Raises:
            ValueError: so many have begun in so many seconds, by a clock that was ahead, too.
        """
        with self._lock:
            self._check_rate(rounds, seconds)

    def _check_rate(self, rounds: int, seconds: float) -> None:
        since = self._clock() - seconds
        if sum(at > since for at in self._begun) >= rounds:
            raise ValueError(
                f"this member took part in {rounds} rounds in {seconds} s already, as many as the "
                "roster allows"
            )

    def write(
        self, session: bytes, round: int, attempt: int, rate: tuple[int, float] | None = None
    ) -> None:
        """Returns when it is on the disk.

        Args:
            session: of the training.
            round: from 1.
            attempt: at the round.
            rate: rounds that may begin in so many seconds, where this is the begin of one.

        Raises:
            ValueError: this round, or a later one, was written already, or too many have begun.
            OSError: it cannot be written.
        """
        with self._lock:
            if (round, attempt) <= self._last.get(session.hex(), (0, -1)):
                raise ValueError("this member took part in this round, or a later one, already")
            if rate is None:
                self._write(["last", session.hex(), round, attempt])
            else:
                self._check_rate(*rate)
                self._write(["mask", session.hex(), round, attempt, self._clock()])

    def unmask(self, sum: Unmasked, check: _Check) -> None:
        """Shares for a sum are about to be given; returns when that is on the disk.

        Raises:
            ValueError: of ``check``.
            OSError: it cannot be written.
        """
        with self._lock:
            check(self._sums)
            if sum.members not in self._numbers:
                self._write(["cohort", sorted(sum.members)])
            told = [sum.roster, sum.epoch, sum.dataset, sum.model.hex()]
            self._write(["sum", *told, self._numbers[sum.members]])

    def check(self, check: _Check) -> None:
        """Ask whether shares for a sum could be given.

        Raises:
            ValueError: of ``check``.
        """
        with self._lock:
            check(self._sums)

    def _write(self, line: Sequence[Any]) -> None:
        if self._path is not None:
            told = json.dumps(line).encode() + b"\n"
            if not self._end:
                told = _form() + told
            with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                file.truncate(self._end)
                file.seek(self._end)
                file.write(told)
                file.flush()
                os.fsync(file.fileno())
            self._end += len(told)
        self._learn(line[0], line[1:])


def _form() -> bytes:
    return json.dumps(_FORM).encode() + b"\n"
