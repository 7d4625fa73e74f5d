"""What has failed on a worker and was not told to the user yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from wsfed import errors
from wsfed.errors import RemoteError
from wsfed.pointers.site import Site, describe_site

__all__ = ["Failures"]

#: A worker may name these; any other name becomes a plain RemoteError.
_CLASSES: Final = {
    name: cls
    for name in errors.__all__
    if isinstance(cls := getattr(errors, name), type) and issubclass(cls, RemoteError)
}
#: Failures nobody awaits are forgotten beyond this number, oldest first.
_MOST: Final = 1000
#: Instead of a frame's number, for what belongs to no command of the session.
_LOCAL: Final = -1


@dataclass(slots=True)
class _Record:
    failure: list[Any]
    #: The user's line; text where another session has described it.
    site: Site | str | None
    worker: str
    bound: bool
    seen: bool = False

    def error(self) -> RemoteError:
        kind, type, message, op, shapes, step = self.failure
        return _CLASSES.get(kind, RemoteError)(
            message,
            type=type,
            op=op,
            shapes=shapes,
            worker=self.worker,
            site=self.site if isinstance(self.site, str) else describe_site(self.site, step),
        )


class Failures:
    """Failures by the command that caused them: number of the frame and place in it.

    Args:
        note: gives the note (the user's line) of a command that is not acknowledged yet.
    """

    def __init__(self, note: Callable[[int, int], Site | None]) -> None:
        self._note = note
        self._records: dict[tuple[int, int], _Record] = {}
        #: Type and message of the last failures that objects told of by themselves.
        self._told: deque[tuple[str, ...]] = deque(maxlen=100)

    def add(self, at: tuple[int, int], failure: list[Any], *, bound: bool, worker: str) -> None:
        """A command without a reply failed; ``bound``: awaiting its result will tell, too."""
        self._records[at] = _Record(failure, self._note(*at), worker, bound)
        if len(self._records) > _MOST:
            del self._records[next(iter(self._records))]

    def add_local(self, error: Exception) -> None:
        """Something failed that belongs to no command of this session."""
        site = worker = ""
        failure: list[Any] = ["RemoteError", type(error).__name__, str(error)[:2000], "move", [], 0]
        if isinstance(error, RemoteError):
            name = type(error).__name__
            failure = [name, error.type, error.message, error.op, list(error.shapes), 0]
            site, worker = error.site, error.worker
        if (said := tuple(failure[1:3])) in self._told:
            self._told.remove(said)
            return
        self._records[_LOCAL, len(self._records)] = _Record(failure, site, worker, bound=False)

    def take(
        self, at: tuple[int, int], failure: list[Any], site: Site | None, *, worker: str
    ) -> RemoteError:
        """The error of a request, which may have failed because of an earlier command."""
        record = self._records.get(at)
        if record is None:
            self._told_by_object(failure)
            return _Record(failure, self._note(*at) or site, worker, bound=True).error()
        record.seen = True
        return record.error()

    def _told_by_object(self, failure: list[Any]) -> None:
        """A transfer may fail with what the object that did not arrive tells, too: once is enough.

        Whether the transfer or the object tells first depends on who is faster.
        """
        said = tuple(failure[1:3])
        for (seq, _), record in self._records.items():
            if seq == _LOCAL and tuple(record.failure[1:3]) == said:
                record.seen = True
                return
        self._told.append(said)

    def next_unbound(self) -> RemoteError | None:
        """The first failure that no awaited result will tell of, once."""
        return self._next(lambda record: not record.bound)

    def next_pending(self) -> RemoteError | None:
        """The first failure of any kind that was not told yet, once."""
        return self._next(lambda record: True)

    def _next(self, wanted: Callable[[_Record], bool]) -> RemoteError | None:
        for record in self._records.values():
            if not record.seen and wanted(record):
                record.seen = True
                return record.error()
        return None

    def unseen(self) -> Iterator[RemoteError]:
        """Everything that was never told."""
        while (error := self.next_pending()) is not None:
            yield error
