"""Arguments of operations, to wire form and back: both halves of one codec.

The tags are in :mod:`wsfed.protocol.values`. Tensors do not travel here: the encoder asks for the
identifier under which the worker has (or will have) a tensor, the decoder for the object of an
identifier. The world is closed: dtypes, layouts, memory formats and devices come from tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NoReturn

import torch

from wsfed.errors import OpNotAllowed, RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol import values as v
from wsfed.protocol.values import Wire
from wsfed.tensors import DTYPE_NAMES

__all__ = ["decode", "encode"]

_MOST_ITEMS: Final = 65_536
_INT_RANGE: Final = range(-(2**63), 2**64)


def _named(kind: type) -> Mapping[str, Any]:
    return MappingProxyType(
        {name: value for name, value in vars(torch).items() if isinstance(value, kind)}
    )


_DTYPES: Final = _named(torch.dtype)
_LAYOUTS: Final = MappingProxyType({"strided": torch.strided})
_FORMATS: Final = _named(torch.memory_format)
_FORMAT_NAMES: Final = MappingProxyType({value: name for name, value in _FORMATS.items()})

# --- client: to wire form ---------------------------------------------------------------------------

_PLAIN: Final = frozenset({type(None), bool, float, str})


def encode(value: Any, ref: Callable[[torch.Tensor], int]) -> Wire:
    """The wire form of an argument.

    Args:
        value: what was given to a torch function.
        ref: gives the identifier of a tensor.

    Raises:
        TypeError: it has no wire form; the text says what to do.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value  # type: ignore[no-any-return]
    if kind is int:
        if value not in _INT_RANGE:
            raise TypeError(f"{value} does not fit into 64 bits")
        return value  # type: ignore[no-any-return]
    if isinstance(value, torch.Tensor):
        return [v.REF, ref(value)]
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(value, ref)
    return _encode_related(value, ref)


def _items(tag: int) -> Callable[[Any, Callable[[torch.Tensor], int]], Wire]:
    def encoder(value: Any, ref: Callable[[torch.Tensor], int]) -> Wire:
        if len(value) > _MOST_ITEMS:
            raise TypeError(f"{len(value)} items are too many; send them as a tensor")
        return [tag, *(encode(item, ref) for item in value)]

    return encoder


def _encode_dict(value: dict[Any, Any], ref: Callable[[torch.Tensor], int]) -> Wire:
    made: list[Wire] = [v.DICT]
    for key, item in value.items():
        if type(key) is not str:
            raise TypeError(f"a dictionary's keys have to be text, not {type(key).__name__}")
        made += [key, encode(item, ref)]
    return made


def _encode_dtype(value: torch.dtype, _: Any) -> Wire:
    return [v.DTYPE, DTYPE_NAMES.get(value) or str(value).removeprefix("torch.")]


_ENCODERS: Final[Mapping[type, Callable[[Any, Callable[[torch.Tensor], int]], Wire]]] = (
    MappingProxyType(
        {
            list: _items(v.LIST),
            tuple: _items(v.TUPLE),
            torch.Size: _items(v.SIZE),
            dict: _encode_dict,
            slice: lambda s, ref: [v.SLICE, *(encode(e, ref) for e in (s.start, s.stop, s.step))],
            type(Ellipsis): lambda _, __: [v.ELLIPSIS],
            complex: lambda c, _: [v.COMPLEX, c.real, c.imag],
            torch.dtype: _encode_dtype,
            torch.device: lambda d, _: [v.DEVICE, str(d)],
            torch.layout: lambda layout, _: [v.LAYOUT, str(layout).removeprefix("torch.")],
            torch.memory_format: lambda f, _: [v.MEMORY_FORMAT, _FORMAT_NAMES[f]],
        }
    )
)
_PYTHON_TYPES: Final = MappingProxyType(
    {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
)


def _encode_related(value: Any, ref: Callable[[torch.Tensor], int]) -> Wire:
    """What is not exactly one of the types above, but is meant as one."""
    if type(value) is type and value in _PYTHON_TYPES:
        return _encode_dtype(_PYTHON_TYPES[value], ref)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # an enumeration, a numpy float64
            return encode(kind(value), ref)
    for kind in (tuple, list, dict):
        if isinstance(value, kind):  # a named tuple, an ordered dictionary
            return _ENCODERS[kind](value, ref)
    if isinstance(value, range):
        return _ENCODERS[list](list(value), ref)
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if type(value).__module__ == "numpy":
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            return encode(value.item(), ref)
        raise TypeError(f"{name} does not travel: write torch.from_numpy(array)")
    if callable(value):
        raise TypeError(f"{name} does not travel: a worker runs no code of the client's")
    raise TypeError(f"{name} does not travel to a worker")


# --- worker: from wire form ---------------------------------------------------------------------------


def decode(wire: Any, resolve: Callable[[int], Any], device: torch.device) -> Any:
    """The argument that a wire form stands for.

    Args:
        wire: as msgpack unpacked it.
        resolve: gives the object of an identifier.
        device: the worker's; no other but the machine's memory may be named.

    Raises:
        RemoteProtocolError: not a wire form.
        OpNotAllowed: a device that is not the worker's.
    """
    return _decode(wire, resolve, device, 0)


def _decode(wire: Any, resolve: Callable[[int], Any], device: torch.device, depth: int) -> Any:
    kind = type(wire)
    if kind in _PLAIN or kind is int:
        return wire
    if kind is not list or not wire or type(wire[0]) is not int:
        _malformed(f"{kind.__name__} is no argument")
    tag = wire[0]
    if tag == v.REF:
        if len(wire) != 2 or type(wire[1]) is not int:
            _malformed("a reference is an identifier")
        return resolve(wire[1])
    if depth >= limits.MAX_DEPTH or len(wire) > _MOST_ITEMS + 1:
        _malformed("an argument is too deep or too long")
    if tag in _CONSTANTS:
        return _constant(tag, wire)
    if tag == v.DEVICE:
        return _device(wire, device)
    items = [_decode(item, resolve, device, depth + 1) for item in wire[1:]]
    return _collection(tag, items)


def _collection(tag: int, items: list[Any]) -> Any:
    if tag == v.LIST:
        return items
    if tag == v.TUPLE:
        return tuple(items)
    if tag == v.SLICE and len(items) == 3:
        return slice(*items)
    if tag == v.DICT and len(items) % 2 == 0 and all(type(key) is str for key in items[::2]):
        return dict(zip(items[::2], items[1::2], strict=True))
    if tag == v.SIZE and all(type(item) is int for item in items):
        return torch.Size(items)
    if tag == v.COMPLEX and len(items) == 2 and all(type(i) in (int, float) for i in items):
        return complex(*items)
    if tag == v.ELLIPSIS and not items:
        return ...
    _malformed(f"there is no such argument (tag {tag})")


_CONSTANTS: Final[Mapping[int, Mapping[str, Any]]] = MappingProxyType(
    {v.DTYPE: _DTYPES, v.LAYOUT: _LAYOUTS, v.MEMORY_FORMAT: _FORMATS}
)


def _constant(tag: int, wire: list[Any]) -> Any:
    name = wire[1] if len(wire) == 2 else None
    if type(name) is not str or name not in _CONSTANTS[tag]:
        _malformed(f"{str(name)[:40]!r} is no dtype, layout or memory format of torch's")
    return _CONSTANTS[tag][name]


def _device(wire: list[Any], device: torch.device) -> torch.device:
    name = wire[1] if len(wire) == 2 else None
    if type(name) is not str or len(name) > 40:
        _malformed("a device is named by text")
    if name not in ("cpu", str(device), device.type):
        raise OpNotAllowed(f"this worker computes on {device}, not on {name!r}")
    return torch.device(name)


def _malformed(reason: str) -> NoReturn:
    raise RemoteProtocolError("malformed", reason)
