"""The objects of one session: tensors under the identifiers that the client chose.

A command that failed leaves its :class:`Failure` under the identifiers of its results, so that
whatever depends on them is passed over and the first await on any of them tells what happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from wsfed.errors import NotFound, QuotaExceeded, RemoteError
from wsfed.tensors import describe
from wsfed.worker.policy import NO_LABELS, Labels

__all__ = ["Entry", "Failure", "Poisoned", "Store"]


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, as it is told to the client.

    ``seq`` and ``index`` name the command, ``step`` the step of a plan, from 1.
    """

    error: str
    type: str
    message: str
    op: str
    shapes: tuple[str, ...]
    seq: int
    index: int
    step: int = 0

    def wire(self) -> list[object]:
        """The failure as messages carry it."""
        return [self.error, self.type, self.message, self.op, list(self.shapes), self.step]


class Poisoned(Exception):
    """An object that a command needs was never made.

    Attributes:
        failure: why.
    """

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


@dataclass(slots=True)
class Entry:
    """An object: its value, what it must not give away, and what it can be found by."""

    value: torch.Tensor | Failure
    labels: Labels = NO_LABELS
    tags: list[str] = field(default_factory=list)
    description: str = ""


class Store:
    """Objects by identifier.

    Args:
        max_bytes: memory that the session's tensors may take together.
        max_objects: how many identifiers may be bound.
    """

    def __init__(self, max_bytes: int, max_objects: int) -> None:
        self._max_bytes, self._max_objects = max_bytes, max_objects
        self._entries: dict[int, Entry] = {}
        self._estimate = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: int) -> bool:
        return id in self._entries

    # --- reading ---

    def entry(self, id: int) -> Entry:
        """The object under ``id``.

        Raises:
            NotFound: there is none in this session.
            Poisoned: the command that should have made it failed.
        """
        entry = self._entries.get(id)
        if entry is None:
            raise NotFound(f"this session has no object {id} (it was deleted, or never made)")
        if isinstance(entry.value, Failure):
            raise Poisoned(entry.value)
        return entry

    def tensor(self, id: int) -> torch.Tensor:
        """The tensor under ``id``; raises as :meth:`entry`."""
        value = self.entry(id).value
        assert isinstance(value, torch.Tensor)
        return value

    def nbytes(self, id: int) -> int:
        """The size of the tensor under ``id``; 0 where there is none."""
        entry = self._entries.get(id)
        return 0 if entry is None else _size(entry.value)

    def tensors(self) -> dict[int, torch.Tensor]:
        """Every tensor there is now, by identifier; for any thread."""
        entries = list(self._entries.items())
        return {id: e.value for id, e in entries if isinstance(e.value, torch.Tensor)}

    def tagged(self, tags: Sequence[str]) -> Iterator[tuple[int, Entry, torch.Tensor]]:
        """Objects that carry all of ``tags`` and at least one tag."""
        for id, entry in self._entries.items():
            if entry.tags and set(tags) <= set(entry.tags) and not isinstance(entry.value, Failure):
                yield id, entry, entry.value

    # --- writing ---

    def put(self, id: int, tensor: torch.Tensor, labels: Labels = NO_LABELS) -> None:
        """Bind ``id``; one that is bound keeps its tags and its labels.

        Raises:
            QuotaExceeded: the session's share is used up. Nothing is bound.
        """
        old = self._entries.get(id)
        size = tensor.nbytes
        if old is None and not labels and self._estimate + size <= self._max_bytes:
            if len(self._entries) < self._max_objects:
                self._entries[id] = Entry(tensor)
                self._estimate += size
                return
        elif old is not None and old.value is tensor:
            old.labels |= labels
            return
        if self._estimate + size - (_size(old.value) if old else 0) > self._max_bytes:
            self._check_bytes(id, tensor)
        if old is None and len(self._entries) >= self._max_objects:
            raise QuotaExceeded(f"a session holds at most {self._max_objects:,} objects")
        if old is not None:
            self._estimate -= _size(old.value)
            self._entries[id] = Entry(tensor, old.labels | labels, old.tags, old.description)
        else:
            self._entries[id] = Entry(tensor, labels)
        self._estimate += size

    def poison(self, ids: Sequence[int], failure: Failure) -> None:
        """The objects under ``ids`` are not what the client believes them to be."""
        for id in ids:
            old = self._entries.get(id)
            if old is not None:
                self._estimate -= _size(old.value)
            self._entries[id] = Entry(failure)

    def delete(self, ids: Sequence[int]) -> None:
        """Forget objects; unknown identifiers are passed over."""
        for id in ids:
            entry = self._entries.pop(id, None)
            if entry is not None:
                self._estimate -= _size(entry.value)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._estimate = 0

    def label_storage(self, tensor: torch.Tensor, labels: Labels) -> None:
        """Rows were written into ``tensor``: whatever shares its memory holds them too."""
        place = tensor.untyped_storage().data_ptr()
        for entry in self._entries.values():
            value = entry.value
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == place:
                entry.labels |= labels

    # --- quota ---

    def has_room(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more would fit, going by the estimate; for any thread."""
        return self._estimate + nbytes <= self._max_bytes

    def check_room(self, nbytes: int) -> None:
        """Whether ``nbytes`` more would fit.

        Raises:
            QuotaExceeded: they would not.
        """
        if not self.has_room(nbytes) and self._bytes() + nbytes > self._max_bytes:
            raise QuotaExceeded(
                f"{nbytes:,} more bytes would be above the {self._max_bytes:,} of this session"
            )

    def _check_bytes(self, id: int, tensor: torch.Tensor) -> None:
        """The estimate counts views as if they had memory of their own; here they share it."""
        if self._bytes(id, tensor) > self._max_bytes:
            limit = f"{self._max_bytes:,} bytes of this session"
            raise QuotaExceeded(f"{describe(tensor)} does not fit into the {limit}")

    def _bytes(self, replaced: int = 0, extra: torch.Tensor | None = None) -> int:
        tensors = [entry.value for id, entry in self._entries.items() if id != replaced]
        storages = {
            (storage := tensor.untyped_storage()).data_ptr(): storage.nbytes()
            for tensor in [*tensors, extra]
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        }
        return sum(storages.values())


def _size(value: torch.Tensor | Failure) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def poison_of(
    error: Exception, op: str, shapes: Sequence[str], at: tuple[int, int], step: int = 0
) -> Failure:
    """The failure that an exception becomes.

    Args:
        error: what was raised.
        op: the operation or the command.
        shapes: of its arguments.
        at: number of the frame and place of the command in it.
        step: of a plan, from 1.
    """
    known = isinstance(error, RemoteError)
    message = error.message if isinstance(error, RemoteError) else str(error)
    return Failure(
        error=type(error).__name__ if known else "RemoteError",
        type=error.type if isinstance(error, RemoteError) else type(error).__name__,
        message=message[:2000],
        op=op[:256],
        shapes=tuple(shapes)[:64],
        seq=at[0],
        index=at[1],
        step=step,
    )
