"""How large a result will be, asked before it is made.

Most operations make results about as large as their arguments; a few arguments of bytes can ask
for any amount (``x.expand(n).clone()``, an outer product, a broadcast). Where the arguments leave
room for much, torch's meta kernel tells the size, once for each distinct call.
"""

from __future__ import annotations

import contextlib
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


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> int:
    return rows.numel() // max(rows.shape[-1], 1) * len(weight) * rows.itemsize


def _convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> int:
    sizes, kernel = input.shape[-(weight.ndim - 2) :], weight.shape[2:]
    rows = input.numel() // max(math.prod(input.shape[-(weight.ndim - 1) :]), 1)
    count = rows * len(weight)
    steps, gaps = _each(stride, sizes), _each(dilation, sizes)
    for place, (size, width) in enumerate(zip(sizes, kernel, strict=True)):
        if padding == "same":
            count *= size
            continue
        beyond = 0 if padding == "valid" else 2 * _each(padding, sizes)[place]
        count *= (size + beyond - gaps[place] * (width - 1) - 1) // steps[place] + 1
    return int(count * input.itemsize)


def _each(value: Any, sizes: Sequence[int]) -> Sequence[int]:
    """One number for all dimensions, or one for each."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * len(sizes) if len(numbers) == 1 else numbers


def _as_given(input: torch.Tensor, *_: Any, **__: Any) -> int:
    return input.nbytes


def _recurrent(input: torch.Tensor, state: Any, *rest: Any) -> int:
    """Then weights, has_biases, num_layers, dropout, train, both_ways, batch_first.

    Raises:
        ValueError: of a packed sequence, where the second argument is its sizes.
    """
    states = [state] if isinstance(state, torch.Tensor) else state
    both_ways = rest[5]
    if states[0].ndim < 2:
        raise ValueError("a packed sequence")
    width = states[0].shape[-1] * (2 if both_ways else 1)
    outputs = input.numel() // max(input.shape[-1], 1) * width * input.itemsize
    return int(outputs + sum(each.nbytes for each in states))


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: Any, width: int, heads: int, *_: Any, **__: Any
) -> int:
    """Of outputs and of weights: as many as there are pairs of places, for each head at most."""
    rows = query.numel() // max(width, 1)
    return int((query.numel() + rows * len(key) * heads) * query.itemsize)


def _broadcast(*operands: Any, **_: Any) -> int:
    """Of arithmetic: the operands' common shape, in the type of the first two of them."""
    shapes = [each.shape for each in operands[:2] if isinstance(each, torch.Tensor)]
    count = math.prod(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    kind = torch.result_type(operands[0], operands[1])
    return int(count * kind.itemsize)


#: Asked for at every turn, and their meta kernels load torch's compiler, which takes seconds.
_BY_SHAPES: Final[Mapping[str, Callable[..., int]]] = MappingProxyType(
    {
        "torch.nn.functional.linear": _linear,
        **{f"torch.nn.functional.conv{n}d": _convolution for n in (1, 2, 3)},
        **{
            f"torch.nn.functional.{kind}_norm": _as_given
            for kind in ("batch", "group", "instance", "layer", "rms")
        },
        **{f"torch.{kind}": _recurrent for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
        "torch.nn.functional.multi_head_attention_forward": _attention,
        **{f"torch.{word}": _broadcast for word in ("add", "sub", "mul")},
        **{f"torch.Tensor.{word}": _broadcast for word in ("add", "sub", "mul")},
    }
)


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
        if (by_shapes := _BY_SHAPES.get(op.name)) is not None:
            with contextlib.suppress(Exception):  # called in another way
                return by_shapes(*args, **kwargs)
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
