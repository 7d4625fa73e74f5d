"""What the rows of a data set are before they are all tensors: texts and pictures, too."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import torch

__all__ = [
    *("Column", "Columns", "Pictures", "Texts", "Unfit"),
    *("allocate", "check_memory", "from_array", "tensor_of"),
]


class Unfit(Exception):
    """What was given can be read, and is not what it has to be; the text says why."""


@dataclass(frozen=True, slots=True)
class Texts:
    """A document a row, to become token ids."""

    rows: Sequence[str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures of any sizes in files; each is read when it is needed, not all at once.

    Attributes:
        names: of the files, as errors tell them.
        sizes: height and width of each.
        channels: 1 or 3, the same for all.
        read: the picture of a row: uint8 ``[channels, height, width]``.
    """

    names: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    channels: int
    read: Callable[[int], torch.Tensor] = field(repr=False)

    def common_size(self) -> tuple[int, int]:
        """Height and width of all of them.

        Raises:
            Unfit: they differ.
        """
        first = self.sizes[0]
        for name, size in zip(self.names, self.sizes, strict=True):
            if size != first:
                raise Unfit(
                    f"{self.names[0]} is {first[0]} pixels high and {first[1]} wide, {name} "
                    f"{size[0]} and {size[1]}; resize them, such as resize:{min(*first, *size)}"
                )
        return first

    def stack(
        self, size: tuple[int, int], change: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """All of them: uint8 ``[rows, channels, *size]``, each changed to that size."""
        images = allocate((len(self.names), self.channels, *size), torch.uint8)
        for row in range(len(self.names)):
            image = self.read(row)
            images[row] = image if change is None else change(image)
        return images


#: One field while it is loaded; at the end of all transforms it has to be a tensor.
Column: TypeAlias = torch.Tensor | Texts | Pictures
Columns: TypeAlias = dict[str, Column]


def tensor_of(column: Column) -> torch.Tensor:
    """The column as a tensor.

    Raises:
        Unfit: it is text, or pictures of different sizes.
    """
    if isinstance(column, Texts):
        raise Unfit("it is text; make it token ids, such as tokenise:bytes,length=128")
    if isinstance(column, Pictures):
        return column.stack(column.common_size())
    return column


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**46  # the system does not tell; its allocator has the last word


#: Bytes of this machine. Systems promise more than there is, and then end the process.
_MEMORY: Final = _memory()


def check_memory(nbytes: int) -> None:
    """Refuse what can never fit.

    Raises:
        MemoryError: this machine has less.
    """
    if nbytes > _MEMORY:
        raise MemoryError


def allocate(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory to be overwritten whole.

    Raises:
        MemoryError: this machine has less.
    """
    check_memory(math.prod(shape) * dtype.itemsize)
    try:
        return torch.empty(tuple(shape), dtype=dtype)
    except RuntimeError:  # what torch's allocator raises
        raise MemoryError from None


def from_array(name: str, values: np.ndarray[Any, Any]) -> torch.Tensor:
    """An array of numbers as a tensor, which may share its memory.

    Raises:
        Unfit: these are no numbers.
    """
    if values.dtype.hasobject:
        raise Unfit(f"field {name!r} holds Python objects; make it a plain array of numbers")
    try:
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        if any(stride < 0 for stride in native.strides) or not native.flags.writeable:
            native = native.copy()
        return torch.from_numpy(native)
    except TypeError:
        raise Unfit(f"field {name!r} is {values.dtype}; encode it as numbers first") from None
