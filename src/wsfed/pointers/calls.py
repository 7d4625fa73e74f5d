"""From a torch call on pointers to one command: scan, infer, encode, issue."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

import torch
from torch.overrides import resolve_name

from wsfed.errors import ConstantTooLarge, NotCollocated, OpNotAllowed, PointerError, ValueNeeded
from wsfed.ops import refused
from wsfed.ops.arguments import encode
from wsfed.ops.table import depends_on_floats, lookup, wire_name
from wsfed.pointers.autograd import Node
from wsfed.pointers.inference import UnknownShape, infer
from wsfed.pointers.link import Link
from wsfed.pointers.recording import recording_now
from wsfed.pointers.shapes import SHAPING, Inferred, Meta, ShapeCache, meta_of
from wsfed.pointers.site import Site, capture_site, describe_site
from wsfed.pointers.views import check_write, followed, share, wrote
from wsfed.protocol import limits, modes
from wsfed.protocol.messages import Execute
from wsfed.protocol.values import REF, Wire

__all__ = [
    "call",
    "check_function",
    "is_pointer",
    "make",
    "mode_now",
    "refuse_function",
    "register",
]

#: Arguments that are written to, by place, each with what it depends on afterwards.
_Written: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
_EXECUTE: Final = Execute.code

_cache: Final = ShapeCache()
#: Set by the module of the class itself, which needs this one.
_make: Callable[..., Any]
_pointer_class: Any


def register(pointer_class: type, make: Callable[..., Any]) -> None:
    """Told once what a pointer is."""
    global _pointer_class, _make
    _pointer_class, _make = pointer_class, make


def make(link: Link, id: int, meta: Meta | None) -> Any:
    """A pointer; ``meta`` is ``None`` while the shape is not known."""
    return _make(link, id, meta)


def is_pointer(value: Any) -> bool:
    """Whether a value is a pointer."""
    return type(value) is _pointer_class


def mode_now() -> int:
    """The modes that a command carries (:mod:`wsfed.protocol.modes`).

    Raises:
        OpNotAllowed: autocast to a dtype that workers do not cast to.
    """
    mode = 0 if _is_grad() else modes.NO_GRAD
    if _is_inference():
        mode = modes.NO_GRAD | modes.INFERENCE
    if _is_autocast():
        mode |= _autocast_now()
    return mode


def _autocast_now() -> int:
    for kind in ("cpu", "cuda", "xpu", "mps"):
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if dtype not in _AUTOCAST:
                raise OpNotAllowed(f"autocast to {dtype} is not carried to workers")
            return _AUTOCAST[dtype]
    return 0


_AUTOCAST: Final = {
    torch.bfloat16: modes.AUTOCAST_BFLOAT16,
    torch.float16: modes.AUTOCAST_FLOAT16,
}


_is_autocast: Final = torch._C._is_any_autocast_enabled
_is_inference: Final = torch.is_inference_mode_enabled
_is_grad: Final = torch.is_grad_enabled


# --- scanning: the key of a call, and its tensors ------------------------------------------------

_TRUE: Final = object()
_FALSE: Final = object()
_FRACTION: Final = object()
#: Between positions and keywords, so that a text in a position is not taken for a keyword.
_KEYWORDS: Final = object()


class _Local(NamedTuple):
    """A local tensor's part of the key."""

    meta: Meta


def _scan(value: Any, key: list[Any], tensors: list[Any]) -> None:
    kind = type(value)
    if kind is _pointer_class:
        tensors.append(value)
        state = value.__dict__
        key.append(followed(state) if "_view_of" in state else state["_meta"])
    elif kind is float:
        key.append(_FRACTION)
    elif kind is bool:
        # True is 1 and 1.0 to a dictionary; torch tells them apart.
        key.append(_TRUE if value else _FALSE)
    elif kind is int or kind is str or value is None:
        key.append(value)
    elif isinstance(value, torch.Tensor):
        tensors.append(value)
        key.append(_Local(meta_of(value)))
    elif isinstance(value, list | tuple):
        key.append((kind, len(value)))
        for item in value:
            _scan(item, key, tensors)
    elif kind is slice:
        key.append(slice)
        for item in (value.start, value.stop, value.step):
            _scan(item, key, tensors)
    elif isinstance(value, dict):
        key.append((kind, *value))
        for item in value.values():
            _scan(item, key, tensors)
    else:
        _scan_other(value, key)


def _scan_other(value: Any, key: list[Any]) -> None:
    kind = type(value)
    if isinstance(value, float):  # numpy's float64, which a schedule of rates may give
        key.append((kind, _FRACTION))
        return
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{kind.__name__} does not travel to a worker{_ADVICE.get(kind.__name__, '')}"
        ) from None
    # 1, 1+0j and numpy's 1 are equal to a dictionary, and torch promotes each in another way.
    key.append((kind, value))


_ADVICE: Final = {"ndarray": "; write torch.from_numpy(array)"}


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    found: list[float] = []
    for value in values:
        if isinstance(value, float):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _floats(value)
    return tuple(found)


# --- calling -------------------------------------------------------------------------------------


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Issue one operation; gives pointers to its results.

    Raises:
        OpNotAllowed: no worker runs it.
        NotCollocated: pointers of two workers.
        ConstantTooLarge: a local tensor that should be sent on purpose.
        ValueNeeded: a pointer whose shape is not known yet.
        Exception: torch's own, for shapes and types that do not fit.
    """
    name = wire_name(function)
    if name is None:
        _refuse(function)
    if kwargs and kwargs.get("out") is not None:
        return _call_into(name, function, args, kwargs)
    mode = mode_now()
    key: list[Any] = [name, mode]
    tensors: list[Any] = []
    is_ordinary = not kwargs
    for arg in args:
        kind = type(arg)
        if kind is _pointer_class and "_odd" not in arg.__dict__:  # the commonest
            tensors.append(arg)
            key.append(arg._meta)
        elif kind is float:
            key.append(_FRACTION)
        elif kind is int:
            key.append(arg)
        else:
            is_ordinary = False
            _scan(arg, key, tensors)
    if kwargs:
        key.append(_KEYWORDS)
        for word, arg in kwargs.items():
            key.append(word)
            _scan(arg, key, tensors)
    if not is_ordinary and not mode & modes.NO_GRAD:
        for tensor in tensors:
            check_function(tensor)
    if depends_on_floats(name):
        key.append(_floats((*args, *kwargs.values())))
    values = _values(SHAPING[name], tensors, key) if name in SHAPING else {}
    site = capture_site(3)
    link = _one_link(name, tensors, site)
    if (recording := recording_now()) is not None:
        recording.saw(tensors)
    whole = tuple(key)
    inferred = _cache.get(whole)
    if inferred is None:
        inferred = _infer(name, function, args, kwargs, values, mode, tensors, link, site)
        _cache.put(whole, inferred)
    plain = inferred.plain
    if plain is not None and not mode & modes.INFERENCE:
        id = link.new_id()
        result = _make(link, id, plain)
        if plain.requires_grad and not plain.is_leaf:
            result.__dict__["_node"] = Node(_nodes(tensors, inferred.parents[0]))
        elif mode:
            result.__dict__["_odd"] = None
        _send(name, [id], args, kwargs, mode, link, site)
        return result
    if not inferred.known:
        return _issue_unresolved(name, args, kwargs, mode, inferred, tensors, link, site)
    return _issue(name, args, kwargs, mode, inferred, tensors, link, site)


def _infer(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[int, torch.Tensor],
    mode: int,
    tensors: list[Any],
    link: Link,
    site: Site | None,
) -> Inferred:
    metas = [_meta(tensor, name) for tensor in tensors]
    kind = link.device.type if mode & modes.AUTOCAST else "meta"
    try:
        return infer(name, function, args, kwargs, metas, values, kind)
    except UnknownShape as unknown:
        raise OpNotAllowed(
            f"what it gives depends on values ({str(unknown)[:200]})",
            op=name,
            site=describe_site(site),
        ) from None


def check_function(tensor: Any) -> None:
    """Refuse what a ``torch.autograd.Function`` gave: its gradient would be lost.

    torch shows such a function to no tensor class. It leaves its mark on the payload of its
    result, though, if the payload of an argument requires grad. What it gives was made where
    gradients are not recorded: such pointers are marked as odd.

    Raises:
        OpNotAllowed: such a function gave it.
    """
    if type(tensor) is not _pointer_class:
        return
    meta = tensor._meta
    if meta is not None and not meta.requires_grad and _any_requires_grad(tensor):
        refuse_function()


def refuse_function() -> NoReturn:
    """Say that a ``torch.autograd.Function`` is not carried to workers."""
    raise OpNotAllowed(
        "its backward would not be called on a worker; write it with torch's operations "
        "(module backward hooks use one, and so does checkpoint(use_reentrant=True))",
        op="torch.autograd.Function",
        site=describe_site(capture_site()),
    )


_any_requires_grad: Final[Callable[..., bool]] = torch._C._any_requires_grad


def _values(
    tells: Callable[[torch.Tensor], bool], tensors: list[Any], key: list[Any]
) -> dict[int, torch.Tensor]:
    """The local tensors whose values tell the shape, by place; the values are part of the key."""
    found = {
        place: tensor.detach().cpu()
        for place, tensor in enumerate(tensors)
        # The first one is what is indexed, packed, repeated.
        if place and type(tensor) is not _pointer_class and tells(tensor) and not tensor.is_meta
    }
    key += [(place, tuple(tensor.flatten().tolist())) for place, tensor in found.items()]
    return found


def _call_into(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``out=``, which torch's optimizers use: no worker takes it, so the result is copied there."""
    out = kwargs["out"]
    others = {word: arg for word, arg in kwargs.items() if word != "out"}
    tensors: list[Any] = []
    _scan([args, others], [], tensors)
    if not any(type(tensor) is _pointer_class for tensor in tensors):
        raise OpNotAllowed("out= takes a pointer where others are given; use copy_", op=name)
    result = call(function, args, others)
    if type(out) is not _pointer_class or type(result) is not _pointer_class:
        raise OpNotAllowed("out= takes one pointer; assign with copy_", op=name)
    if torch.is_grad_enabled() and (result.requires_grad or out.requires_grad):
        raise RuntimeError(
            f"{name}: functions with out=... arguments don't support automatic differentiation, "
            "but one of the arguments requires grad."
        )
    if (out.shape, out.dtype) != (result.shape, result.dtype):
        raise OpNotAllowed("out= has another shape or dtype; assign with copy_", op=name)
    return out.copy_(result)


def _refuse(function: Callable[..., Any]) -> NoReturn:
    name = resolve_name(function) or getattr(function, "__name__", str(function))
    if getattr(torch, name, None) is function:
        name = f"torch.{name}"
    why = refused.reason(name) or "no worker knows this operation"
    if isinstance(function, torch._ops.OpOverload):
        name = f"torch.func or torch.ops ({name})"
        why = (
            "transforms of functions are not carried to workers, nor are torch's inner operations: "
            "write torch.autograd.grad, or torch.autograd.functional.jacobian and its like"
        )
    raise OpNotAllowed(why, op=name, site=describe_site(capture_site()))


def _meta(tensor: Any, name: str) -> Meta:
    meta: Meta | None = tensor._meta if type(tensor) is _pointer_class else meta_of(tensor)
    if meta is None:
        raise ValueNeeded(
            name, repr(tensor), "its shape depends on values: write `await pointer.resolve()` first"
        )
    return meta


def _one_link(name: str, tensors: list[Any], site: Site | None) -> Link:
    link: Link | None = None
    for tensor in tensors:
        if type(tensor) is _pointer_class:
            other: Link = tensor._handle.link
            if link is None:
                link = other
            elif other is not link:
                raise NotCollocated(name, (link.worker.id, other.worker.id), describe_site(site))
    assert link is not None, "a call without pointers does not come here"
    return link


def _issue(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: int,
    inferred: Inferred,
    tensors: list[Any],
    link: Link,
    site: Site | None,
) -> Any:
    written = inferred.written
    if written or mode & modes.INFERENCE:
        written = _check_written(name, mode, written, tensors)
    outs: list[int] = []
    results: list[Any] = []
    unneeded: list[int] = []
    for out, view, parents in zip(inferred.outs, inferred.views, inferred.parents, strict=True):
        if type(out) is int:
            result = tensors[out]
            outs.append(result._handle.id if type(result) is _pointer_class else link.new_id())
        elif isinstance(out, torch.Tensor):
            result = out.clone()
            unneeded.append(link.new_id())
            outs.append(unneeded[-1])
        else:
            id = link.new_id()
            result = _make(link, id, out)
            if out.requires_grad and not out.is_leaf:  # type: ignore[union-attr]
                result.__dict__["_node"] = Node(_nodes(tensors, parents))
            elif mode:
                result.__dict__["_odd"] = None
            if view >= 0 and type(tensors[view]) is _pointer_class:
                share(result.__dict__, tensors[view].__dict__)
            outs.append(id)
        results.append(result)
    _send(name, outs, args, kwargs, mode, link, site)
    for id in unneeded:
        link.release(id)
    for place, meta, parents in inferred.changed:
        _change(tensors[place], meta, _nodes(tensors, parents))
    if written and not mode & modes.NO_GRAD:
        _follow_writes(written, tensors)
    return results[0] if inferred.spec is None else inferred.build(results)


def _send(
    name: str,
    outs: list[int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: int,
    link: Link,
    site: Site | None,
) -> None:
    """Encode and issue; local tensors travel ahead and are freed behind."""
    wire_args: list[Any] = []
    for arg in args:
        kind = type(arg)
        if kind is _pointer_class:
            wire_args.append([REF, arg._handle.id])
        elif kind is float or kind is bool or arg is None:
            wire_args.append(arg)
        else:
            break
    else:
        if not kwargs:
            link.issue([_EXECUTE, name, outs, wire_args, {}, mode], site)
            return
    constants: list[int] = []

    def ref(tensor: torch.Tensor) -> int:
        if type(tensor) is _pointer_class:
            return tensor._handle.id  # type: ignore[attr-defined, no-any-return]
        return _constant(name, tensor, link, constants, site)

    try:
        wire_args = [_wire(arg, name, link, ref) for arg in args]
        wire_kwargs = {word: _wire(arg, word, link, ref) for word, arg in kwargs.items()}
        link.issue([_EXECUTE, name, outs, wire_args, wire_kwargs, mode], site)
    finally:
        for id in constants:
            link.release(id)


def _wire(value: Any, word: str, link: Link, ref: Callable[[torch.Tensor], int]) -> Wire:
    """An argument's wire form, the commonest ones first."""
    kind = type(value)
    if kind is _pointer_class:
        return [REF, value._handle.id]
    if kind is float:
        return value  # type: ignore[no-any-return]
    if kind is torch.device or kind is str:
        value = _device(value, word, link)
    return encode(value, ref)


def _device(value: Any, word: str, link: Link) -> Any:
    """The worker's device, where one is named that only stands for the pointers' own."""
    if type(value) is torch.device and value.type == "meta":
        return link.device
    if type(value) is str and word in ("device", "torch.Tensor.to") and value == "meta":
        return link.device
    if type(value) is str and word == "device":
        return torch.device(value)
    if type(value) is str and word == "torch.Tensor.to":
        return torch.device(value)
    return value


def _nodes(tensors: list[Any], places: tuple[int, ...]) -> tuple[Node, ...]:
    pointers = [tensors[place] for place in places]
    return tuple([each._graph_node() for each in pointers if type(each) is _pointer_class])


def _constant(
    name: str, tensor: torch.Tensor, link: Link, made: list[int], site: Site | None
) -> int:
    if tensor.is_meta:
        raise PointerError(
            f"{name} met a local tensor on the meta device, which has no values (torch.tensor(p) "
            "of a pointer p gives one: write p.clone())"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise PointerError(
            f"{name} met a local tensor that requires grad and a pointer on "
            f"{link.worker.id!r}: its gradient would be lost; send it (or its module) first"
        )
    if tensor.nbytes > limits.MAX_CONSTANT_BYTES:
        raise ConstantTooLarge(name, tensor.nbytes, limits.MAX_CONSTANT_BYTES)
    id = link.new_id()
    link.store(id, tensor, False, site)
    made.append(id)
    return id


# --- what an operation changes -------------------------------------------------------------------


def _change(tensor: Any, meta: Meta, parents: tuple[Node, ...]) -> None:
    """An argument has another shape, or another place in the graph."""
    if type(tensor) is not _pointer_class:
        return
    state = tensor.__dict__
    node: Node | None = state.get("_node")
    if meta.requires_grad and not meta.is_leaf:
        state["_node"] = Node(parents)
    elif node is not None and node.parents:
        state["_node"] = None  # a leaf keeps its own, and its gradient, whether frozen or not
    tensor._set_meta(meta)


def _check_written(name: str, mode: int, written: _Written, tensors: list[Any]) -> _Written:
    """The arguments that are written to; the writing happens on the worker.

    Tensors of inference mode do not count their writes, so that the name has to tell.
    """
    if mode & modes.INFERENCE and lookup(name).inplace:
        written = ((0, ()),)
    for place, _ in written:
        if type(tensors[place]) is _pointer_class:
            if not mode & modes.NO_GRAD:
                check_write(tensors[place].__dict__)
        else:
            raise PointerError(
                f"{name} would write into a local tensor what is on a worker: "
                "send the local tensor first, or get the pointer's value (of a module's state: "
                "bring the module home with wsfed.get(module))"
            )
    return written


def _follow_writes(written: _Written, tensors: list[Any]) -> None:
    """After a write, a tensor and what it is a view of depend on more."""
    for place, parents in written:
        meta = tensors[place]._meta
        if meta is None or not meta.requires_grad or meta.is_leaf:
            continue
        state = tensors[place].__dict__
        state["_node"] = Node(_nodes(tensors, parents))
        wrote(state)


# --- shapes that depend on values ----------------------------------------------------------------


def _issue_unresolved(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: int,
    inferred: Inferred,
    tensors: list[Any],
    link: Link,
    site: Site | None,
) -> Any:
    """Results whose shapes only the worker can tell."""
    results = [_make(link, link.new_id(), None) for _ in inferred.outs]
    _send(name, [result._handle.id for result in results], args, kwargs, mode, link, site)
    for result, parents in zip(results, inferred.parents, strict=True):
        result.__dict__["_node"] = Node(_nodes(tensors, parents)) if parents else None
    if link.blocking and recording_now() is None:
        for result in results:
            result.resolve()
    return results[0] if inferred.spec is None else inferred.build(results)
