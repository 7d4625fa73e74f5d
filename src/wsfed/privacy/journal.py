"""The last rounds in which a member took part, on disk: it never takes part twice."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

__all__ = ["Journal"]


class Journal:
    """Round and attempt of each session.

    Args:
        path: of a file, which is made if it is not there; ``None`` to forget with the process.

    Raises:
        ValueError: the file is no journal.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._last: dict[str, tuple[int, int]] = {}
        if self._path is not None and self._path.exists():
            try:
                told = json.loads(self._path.read_text())
                self._last = {str(k): (int(r), int(a)) for k, (r, a) in told.items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is no journal: {error}") from None

    def last(self, session: bytes) -> tuple[int, int]:
        """Round and attempt, ``(0, -1)`` for a session that is new."""
        with self._lock:
            return self._last.get(session.hex(), (0, -1))

    def write(self, session: bytes, round: int, attempt: int) -> None:
        """Returns when it is on the disk.

        Raises:
            ValueError: this round, or a later one, was written already.
            OSError: it cannot be written.
        """
        with self._lock:
            if (round, attempt) <= self._last.get(session.hex(), (0, -1)):
                raise ValueError("this member took part in this round, or a later one, already")
            self._last[session.hex()] = (round, attempt)
            if self._path is None:
                return
            partial = self._path.with_name(self._path.name + ".partial")
            with partial.open("w") as file:
                json.dump(self._last, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
