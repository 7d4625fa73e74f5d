"""The model on its way to the workers: what a worker has already is not sent again.

Whether two values are the same is told by SHA-256 of dtype, shape and bytes, so nothing is kept of
what was sent but 32 bytes. A digest is made once for all workers, and so is a cast.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from wsfed.federated.compression import Cast, is_compressed
from wsfed.federated.strategies.strategy import State
from wsfed.tensors import hash_of

__all__ = ["Broadcast", "Part", "digests_of"]


def digests_of(state: State) -> dict[str, bytes]:
    """SHA-256 of each value, by name."""
    return {name: hash_of([value]) for name, value in state.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """One value of the model.

    Attributes:
        digest: of what is sent.
        dtype: in which it is sent.
        cast: what is sent, where that is not the value itself.
        of: the value; not held, and good only as long as it is of this version.
        version: how often it had been written to.
    """

    digest: bytes
    dtype: torch.dtype
    cast: torch.Tensor | None
    of: weakref.ref[torch.Tensor]
    version: int

    def is_of(self, value: torch.Tensor) -> bool:
        """Whether this is about that value as it is now."""
        return self.of() is value and self.version == _version(value)


class Broadcast:
    """What goes to the workers, of the model that was prepared last.

    Args:
        cast: in which the model travels.
        buffers: names of what is not cast.
    """

    def __init__(self, cast: Cast | None, buffers: frozenset[str]) -> None:
        self._cast, self._buffers = cast, buffers
        self._parts: dict[str, Part] = {}

    def prepare(self, state: State) -> None:
        """Digest and cast a model: work in proportion to its size. In any thread."""
        self._parts = {name: self.part(name, value) for name, value in state.items()}

    def digests(self, state: State) -> dict[str, bytes]:
        """Of what would be sent of another model. In any thread."""
        return {name: self.part(name, value.detach()).digest for name, value in state.items()}

    def part(self, name: str, value: torch.Tensor) -> Part:
        """What is sent of a value; it is made now, unless it was prepared."""
        known = self._parts.get(name)
        if known is not None and known.is_of(value):
            return known
        version = _version(value)
        sent = value.detach()
        if self._cast is not None and is_compressed(name, value, self._buffers):
            sent = self._cast.cast(sent)
        cast = None if sent.dtype is value.dtype else sent
        return Part(hash_of([sent]), sent.dtype, cast, weakref.ref(value), version)


def _version(value: torch.Tensor) -> int:
    return -1 if value.is_inference() else value._version
