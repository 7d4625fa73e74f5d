"""How large a result will be, asked before it is made.

Most operations make results about as large as their arguments; a few arguments of bytes can ask
for any amount (``x.expand(n).clone()``, an outer product, a broadcast). Where the arguments leave
room for much, torch's meta kernel tells the size, once for each distinct call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from wsfed.ops.table import Op

__all__ = ["ResultSizes", "depends_on_values"]

#: Results that cannot be larger than this are not looked into.
_SMALL: Final = 16 * 2**20
_MOST: Final = 4096
_WIDEST: Final = 16  # bytes of a complex128


def _repeated(tensor: Any, repeats: Any, dim: Any = None, **_: Any) -> int:
    rows = tensor.numel() if dim is None else tensor.shape[dim]
    row: int = tensor.numel() // max(rows, 1) * tensor.itemsize
    return int(repeats.sum()) * row


def _repeated_places(repeats: Any, **_: Any) -> int:
    return int(repeats.sum()) * 8


def _counted(values: Any, *_: Any, **__: Any) -> int:
    return (int(values.max()) + 1) * 8 if values.numel() else 0


def _one_hot(values: Any, num_classes: int = -1) -> int:
    classes = num_classes if num_classes >= 0 else int(values.max()) + 1
    return int(values.numel()) * classes * 8


#: Operations of which values tell how large the result is.
_BY_VALUES: Final[Mapping[str, Callable[..., int]]] = MappingProxyType(
    {
        "torch.repeat_interleave": lambda *args, **kwargs: (
            _repeated(*args, **kwargs)
            if len(args) + ("repeats" in kwargs) > 1
            else _repeated_places(*args, **kwargs)
        ),
        "torch.Tensor.repeat_interleave": _repeated,
        "torch.bincount": _counted,
        "torch.Tensor.bincount": _counted,
        "torch.nn.functional.one_hot": _one_hot,
    }
)


#: No larger than the labels they are given: nothing is broadcast in them.
_NO_LARGER: Final = frozenset({"torch.nn.functional.cross_entropy", "torch.nn.functional.nll_loss"})
#: Asked for at every turn, and its meta kernel loads torch's compiler, which takes seconds.
_LINEAR: Final = "torch.nn.functional.linear"


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> int:
    return rows.numel() // max(rows.shape[-1], 1) * len(weight) * rows.itemsize


def depends_on_values(name: str) -> bool:
    """Whether the size of this operation's result has to be asked for at each call."""
    return name in _BY_VALUES


class ResultSizes:
    """Sizes of results, remembered."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], int] = {}

    def of(self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Bytes of results that are new memory; 0 where they cannot be many or are not known."""
        if (by_values := _BY_VALUES.get(op.name)) is not None:
            return _asked(by_values, args, kwargs)
        if op.inplace or op.name in _NO_LARGER or (not kwargs and _are_few(args)):
            return 0
        leaves = list(_leaves((*args, *kwargs.values())))
        if _bound(leaves) <= _SMALL:
            return 0
        if op.name == _LINEAR and not kwargs and len(args) in (2, 3):
            return _asked(_linear, args, {})
        key = (op.name, *map(_key, leaves))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            known = self._known[key] = _infer(op, args, kwargs)
        return known


def _asked(size: Callable[..., int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    try:
        return max(size(*args, **kwargs), 0)
    except Exception:  # the operation itself will say what is wrong
        return 0


def _are_few(args: Sequence[Any]) -> bool:
    """The commonest case, told without looking into much: few elements and no large numbers."""
    bound = _WIDEST
    for arg in args:
        kind = type(arg)
        if kind is torch.Tensor:
            bound *= arg.numel() or 1
        elif (kind is not int and kind is not float) or not -1 <= arg <= 1:
            return False
    return bound <= _SMALL


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _bound(leaves: Sequence[Any]) -> int:
    """No ordinary result has more bytes: all sizes, and each number in three dimensions."""
    return _WIDEST * math.prod(map(_factor, leaves))


def _factor(leaf: Any) -> int:
    if isinstance(leaf, torch.Tensor):
        return max(leaf.numel(), 1)
    if type(leaf) is int:
        return max(abs(leaf), 1) ** 3
    if type(leaf) is float and math.isfinite(leaf):
        return math.ceil(max(abs(leaf), 1.0)) ** 3
    return 1


def _key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.stride() if leaf.layout is torch.strided else None
    return type(leaf), str(leaf)[:200]


def _infer(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    try:
        with torch.no_grad():
            shadows = pytree.tree_map_only(torch.Tensor, _shadow, (tuple(args), dict(kwargs)))
            result = op.call(*shadows[0], **shadows[1])
    except Exception:  # the operation itself will say what is wrong, or has no meta kernel
        return 0
    return sum(
        leaf.nbytes
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, torch.Tensor) and leaf.is_meta and not _is_view(leaf, shadows)
    )


def _shadow(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _is_view(leaf: torch.Tensor, shadows: Any) -> bool:
    memory = leaf.untyped_storage()._cdata
    return any(
        isinstance(each, torch.Tensor) and each.untyped_storage()._cdata == memory
        for each in pytree.tree_leaves(shadows)
    )
