"""Shape inference, remembered: what an operation gives, from what it is given.

torch's own meta kernels tell shape, stride, dtype, ``requires_grad``, which argument is returned,
and raise torch's own errors. They take 60 to 860 µs for many operations, so each distinct call is
inferred once. A call is told apart by the function, the modes, the metadata of its tensors and its
other arguments; of fractional numbers only that they are such (they change at every step of an
optimizer), unless the shape depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

__all__ = ["SHAPING", "Inferred", "Meta", "ShapeCache", "UnknownShape", "intern_meta", "meta_of"]

_OFF = torch._C.DisableTorchFunctionSubclass
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
        found = _INTERNED[key] = Meta(*key)
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


class UnknownShape(Exception):
    """The result's shape depends on values."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """What a call gives.

    Attributes:
        outs: for each tensor of the result: its metadata, the place of the argument it is, or
            the tensor itself where local values tell it.
        views: for each of them: the place of the argument whose memory it shares, or -1.
        changed: arguments whose metadata is another afterwards, by place.
        written: places of the arguments that are written to.
        spec: how the result is built of its tensors; ``None`` for a single one.
    """

    outs: tuple[Meta | int | torch.Tensor, ...]
    views: tuple[int, ...]
    changed: tuple[tuple[int, Meta], ...]
    written: tuple[int, ...]
    spec: tuple[list[Any], pytree.TreeSpec] | None

    def build(self, tensors: Sequence[Any]) -> Any:
        """The result, made of its tensors."""
        if self.spec is None:
            return tensors[0]
        leaves, spec = self.spec
        filled = iter(tensors)
        return pytree.tree_unflatten(
            [next(filled) if leaf is _TENSOR else leaf for leaf in leaves], spec
        )


_TENSOR: Final = object()


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

    def get(self, key: tuple[Any, ...]) -> Inferred | None:
        """What is known of a call."""
        return self._known.get(key)

    def infer(
        self,
        key: tuple[Any, ...],
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        metas: Sequence[Meta],
        values: Mapping[int, torch.Tensor] = MappingProxyType({}),
    ) -> Inferred:
        """Run the meta kernel and remember what it gives.

        Args:
            key: of the call.
            function: torch's.
            args: with tensors in their places.
            kwargs: likewise.
            metas: of the tensors, in the order in which they are met.
            values: local tensors whose values tell the shape, by their place among these.

        Raises:
            UnknownShape: the shape depends on values.
            Exception: torch's own, for a wrong call.
        """
        shadows = [values.get(place, _shadow(meta)) for place, meta in enumerate(metas)]
        inferred = _infer(function, args, kwargs, shadows, metas)
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = inferred
        return inferred


def _infer(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    shadows: list[torch.Tensor],
    metas: Sequence[Meta],
) -> Inferred:
    versions = [_version(shadow) for shadow in shadows]
    try:
        result = _run(function, args, kwargs, shadows, torch.device("meta"))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        # Some of torch's functions look at values without saying NotImplemented.
        if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
            raise UnknownShape(str(error)) from None
        if any(not shadow.is_meta for shadow in shadows):
            raise  # the values of others, which are not here, would make another error
        raise (_usual_error(function, args, kwargs, metas) or error) from None
    with _OFF():
        written = (at for at, old in enumerate(versions) if _version(shadows[at]) != old)
        return _read(result, shadows, metas, tuple(written))


def _run(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    tensors: Sequence[torch.Tensor],
    device: torch.device,
) -> Any:
    """Call the function with these tensors in the places of its own."""
    give = iter(tensors)
    own_args = [_replace(arg, give, device) for arg in args]
    own_kwargs = {
        name: device
        if name == "device" and value is not None
        else _number(name, _replace(value, give, device))
        for name, value in kwargs.items()
    }
    if function is torch.Tensor.to:
        own_args[1:] = [device if isinstance(arg, str) else arg for arg in own_args[1:]]
    elif function is torch.full_like and len(own_args) > 1:
        own_args[1] = _number("fill_value", own_args[1])
    with _OFF():
        return function(*own_args, **own_kwargs)


def _number(name: str, value: Any) -> Any:
    """``alpha=`` and its like take a tensor for a number, and a meta tensor has none.

    No shape depends on them. torch's L-BFGS computes them, and the worker reads them.
    """
    if name not in ("alpha", "beta", "value", "fill_value") or not isinstance(value, torch.Tensor):
        return value
    if value.ndim or value.requires_grad:
        return value
    return torch.ones((), dtype=value.dtype).item()


#: Elements of all arguments up to which a wrong call is made once more, for its usual error.
_FEW: Final = 1_000_000


def _usual_error(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    metas: Sequence[Meta],
) -> Exception | None:
    """What torch says of a wrong call on the CPU; meta kernels word some errors otherwise."""
    extents = [_extent(meta) for meta in metas]
    if sum(extents) > _FEW:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            zeros = [
                torch.zeros(extent, dtype=meta.dtype).as_strided(meta.shape, meta.stride)
                for meta, extent in zip(metas, extents, strict=True)
            ]
            _run(function, args, kwargs, zeros, torch.device("cpu"))
    except (RuntimeError, ValueError, IndexError, TypeError) as usual:
        return usual
    return None


def _extent(meta: Meta) -> int:
    """Elements of the memory that a tensor spans, at least one."""
    reach = sum((size - 1) * step for size, step in zip(meta.shape, meta.stride, strict=True))
    return max(1 + reach, 1)


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to; tensors of inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def _read(
    result: Any, shadows: list[torch.Tensor], metas: Sequence[Meta], written: tuple[int, ...]
) -> Inferred:
    leaves, spec = pytree.tree_flatten(result)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    places = {id(shadow): place for place, shadow in reversed(list(enumerate(shadows)))}
    roots = {id(_root(shadow)): place for place, shadow in reversed(list(enumerate(shadows)))}
    single = isinstance(result, torch.Tensor)
    return Inferred(
        outs=tuple(places.get(id(t), meta_of(t) if t.is_meta else t) for t in tensors),
        views=tuple(roots.get(id(_root(t)), -1) if t._is_view() else -1 for t in tensors),
        changed=tuple(
            (place, after)
            for place, (shadow, before) in enumerate(zip(shadows, metas, strict=True))
            if (after := meta_of(shadow)) is not before and _differ(after, before)
        ),
        written=written,
        spec=None
        if single
        else ([_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec),
    )


def _differ(a: Meta, b: Meta) -> bool:
    return (a.shape, a.stride, a.dtype, a.requires_grad, a.is_leaf) != (
        b.shape,
        b.stride,
        b.dtype,
        b.requires_grad,
        b.is_leaf,
    )


def _root(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor._base is None else tensor._base


def _shadow(meta: Meta) -> torch.Tensor:
    """A meta tensor with this metadata, with a graph of its own where it is no leaf."""
    if not meta.requires_grad or meta.is_leaf:
        made = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
        return made.requires_grad_(meta.requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), dtype=meta.dtype, device="meta", requires_grad=True)
        if any(step == 0 and size > 1 for size, step in zip(meta.shape, meta.stride, strict=True)):
            return _expanded(leaf, meta)
        made = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
        return made.copy_(leaf)


def _expanded(leaf: torch.Tensor, meta: Meta) -> torch.Tensor:
    """Elements that share memory cannot be written to, so it has to be a view."""
    memory = leaf.expand(_extent(meta)) * 1
    return memory.as_strided(meta.shape, meta.stride)


def _replace(value: Any, give: Iterator[torch.Tensor], device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return next(give)
    if type(value) in (int, float, bool, str, type(None)):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replace(item, give, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_replace(item, give, device) for item in value)
    if isinstance(value, dict):
        return {key: _replace(item, give, device) for key, item in value.items()}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return slice(*(_replace(part, give, device) for part in parts))
    if isinstance(value, torch.device):
        return device
    return value
