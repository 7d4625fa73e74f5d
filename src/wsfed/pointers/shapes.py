"""Shape inference, remembered: what an operation gives, from what it is given.

torch's own meta kernels tell shape, stride, dtype, ``requires_grad``, which argument is returned,
and raise torch's own errors. They take 60 to 860 µs for many operations, so each distinct call is
inferred once. A call is told apart by the function, the modes, the metadata of its tensors and its
other arguments; of fractional numbers only that they are such (they change at every step of an
optimizer), unless the shape depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

__all__ = ["SHAPING", "TENSOR", "Inferred", "Meta", "ShapeCache", "intern_meta", "meta_of"]

#: Distinct calls and distinct metadata that are remembered; a training loop has hundreds.
_MOST: Final = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Meta:
    """Metadata of a tensor; equal ones are one object, so that comparing is cheap."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    is_leaf: bool
    nbytes: int


_INTERNED: dict[tuple[Any, ...], Meta] = {}


def intern_meta(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    requires_grad: bool,
    is_leaf: bool,
) -> Meta:
    """The one object for this metadata."""
    key = (shape, stride, dtype, requires_grad, is_leaf)
    found = _INTERNED.get(key)
    if found is None:
        if len(_INTERNED) >= _MOST:
            _INTERNED.clear()
        found = _INTERNED[key] = Meta(*key, math.prod(shape) * dtype.itemsize)
    return found


def meta_of(tensor: torch.Tensor) -> Meta:
    """Metadata of a plain tensor."""
    return intern_meta(
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.requires_grad,
        tensor.is_leaf,
    )


@dataclass(frozen=True, slots=True)
class Inferred:
    """What a call gives.

    Attributes:
        outs: for each tensor of the result: its metadata, the place of the argument it is, or
            the tensor itself where local values tell it.
        views: for each of them: the place of the argument whose memory it shares, or -1.
        parents: for each of them: the places of the arguments that its gradient flows to.
        changed: arguments whose metadata is another afterwards: place, metadata, parents.
        written: arguments that are written to: place, parents.
        spec: how the result is built of its tensors; ``None`` for a single one.
        known: whether the metadata of the results are the true ones; if not, the worker is asked.
        plain: the metadata of the result, where one of new memory is all there is.
    """

    outs: tuple[Meta | int | torch.Tensor, ...]
    views: tuple[int, ...]
    parents: tuple[tuple[int, ...], ...]
    changed: tuple[tuple[int, Meta, tuple[int, ...]], ...]
    written: tuple[tuple[int, tuple[int, ...]], ...]
    spec: tuple[list[Any], pytree.TreeSpec] | None
    known: bool = True

    plain: Meta | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        is_one = self.spec is None and self.views == (-1,) and self.known
        if is_one and not (self.changed or self.written) and isinstance(self.outs[0], Meta):
            object.__setattr__(self, "plain", self.outs[0])

    def build(self, tensors: Sequence[Any]) -> Any:
        """The result, made of its tensors."""
        if self.spec is None:
            return tensors[0]
        leaves, spec = self.spec
        filled = iter(tensors)
        return pytree.tree_unflatten(
            [next(filled) if leaf is TENSOR else leaf for leaf in leaves], spec
        )


#: Stands for a tensor among the leaves of a result.
TENSOR: Final = object()


#: Whether the values of a local tensor tell the shape, by the operation it is given to.
SHAPING: Final[Mapping[str, Callable[[torch.Tensor], bool]]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("torch._pack_padded_sequence", "torch._pad_packed_sequence"),
                *("torch.lstm", "torch.gru", "torch.rnn_tanh", "torch.rnn_relu"),
                *("torch.repeat_interleave", "torch.Tensor.repeat_interleave"),
            ),
            lambda tensor: tensor.dtype is torch.int64,
        ),
        "torch.Tensor.__getitem__": lambda tensor: tensor.dtype in (torch.bool, torch.uint8),
    }
)


class ShapeCache:
    """Calls that were inferred."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Inferred] = {}
        self.get = self._known.get

    def put(self, key: tuple[Any, ...], inferred: Inferred) -> None:
        """Remember what a call gives; ``get`` tells of it, or gives ``None``."""
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = inferred
