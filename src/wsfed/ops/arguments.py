"""Arguments of operations, to wire form and back: both halves of one codec.

The tags are in :mod:`wsfed.protocol.values`. Tensors do not travel here: the encoder asks for the
identifier under which the worker has (or will have) a tensor, the decoder for the object of an
identifier. The world is closed: dtypes, layouts, memory formats and devices come from tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import EllipsisType, MappingProxyType
from typing import Any, Final, NoReturn, TypeAlias

import torch

from wsfed.errors import OpNotAllowed, RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol import values as v
from wsfed.protocol.values import Wire

__all__ = ["MAX_ITEMS", "decode", "encode"]

Ref: TypeAlias = Callable[[torch.Tensor], int]
Resolve: TypeAlias = Callable[[int], Any]

#: Items of one collection: an index list of that length is a tensor's work.
MAX_ITEMS: Final = 65_536

#: What msgpack packs.
_INT_RANGE: Final = range(-(2**63), 2**64)


def _dtypes() -> Mapping[str, torch.dtype]:
    """Every dtype by its own name (not its aliases), except those of quantised tensors."""
    found = {str(d).removeprefix("torch."): d for d in vars(torch).values() if _is_dtype(d)}
    refused = ("q", "bits")
    return MappingProxyType({name: d for name, d in found.items() if not name.startswith(refused)})


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)


_DTYPES: Final = _dtypes()
_LAYOUTS: Final[Mapping[str, torch.layout]] = MappingProxyType({"strided": torch.strided})
_FORMATS: Final[Mapping[str, torch.memory_format]] = MappingProxyType(
    {
        "channels_last": torch.channels_last,
        "channels_last_3d": torch.channels_last_3d,
        "contiguous_format": torch.contiguous_format,
        "preserve_format": torch.preserve_format,
    }
)
#: The tags whose values come from a table, by the name that follows the tag.
_CONSTANTS: Final[Mapping[int, Mapping[str, Any]]] = MappingProxyType(
    {v.DTYPE: _DTYPES, v.LAYOUT: _LAYOUTS, v.MEMORY_FORMAT: _FORMATS}
)

# --- client: to wire form -------------------------------------------------------------------------


def encode(value: Any, ref: Ref) -> Wire:
    """The wire form of an argument.

    Args:
        value: what was given to a torch function.
        ref: gives the identifier of a tensor.

    Raises:
        TypeError: it has no wire form; the text says what to do.
    """
    return _encode(value, ref, 0)


def _encode(value: Any, ref: Ref, depth: int) -> Wire:
    kind = type(value)
    if kind is bool or kind is float or value is None:
        return value  # type: ignore[no-any-return]
    if isinstance(value, torch.Tensor):
        return [v.REF, ref(value)]
    encoder = _ENCODERS.get(kind) or _related(value)
    if depth >= limits.MAX_DEPTH and kind is not int and kind is not str:
        raise TypeError(f"an argument nests deeper than {limits.MAX_DEPTH}")
    return encoder(value, ref, depth)


def _int(value: int, ref: Ref, depth: int) -> Wire:
    if value not in _INT_RANGE:
        raise TypeError("an integer does not fit into 64 bits; send it as a float or a tensor")
    return value


def _str(value: str, ref: Ref, depth: int) -> Wire:
    if len(value) > limits.MAX_TEXT:
        raise TypeError(f"a text of {len(value):,} characters is too long")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise TypeError("a text with half a surrogate pair is no Unicode")
    return value


def _items(tag: int) -> Callable[[Any, Ref, int], Wire]:
    def encoder(value: Any, ref: Ref, depth: int) -> Wire:
        if len(value) > MAX_ITEMS:
            raise TypeError(f"{len(value):,} items are too many; send them as a tensor")
        return [tag, *(_encode(item, ref, depth + 1) for item in value)]

    return encoder


def _dict(value: Mapping[Any, Any], ref: Ref, depth: int) -> Wire:
    if 2 * len(value) > MAX_ITEMS:
        raise TypeError(f"a dictionary of {len(value):,} entries is too large")
    made: list[Wire] = [v.DICT]
    for key, item in value.items():
        if type(key) is not str:
            raise TypeError(f"a dictionary's keys have to be text, not {type(key).__name__}")
        made += [_str(key, ref, depth), _encode(item, ref, depth + 1)]
    return made


def _slice(value: slice, ref: Ref, depth: int) -> Wire:
    parts = (value.start, value.stop, value.step)
    return [v.SLICE, *(_encode(part, ref, depth + 1) for part in parts)]


def _dtype(value: torch.dtype, ref: Ref, depth: int) -> Wire:
    return _named(v.DTYPE, str(value).removeprefix("torch."))


def _layout(value: torch.layout, ref: Ref, depth: int) -> Wire:
    return _named(v.LAYOUT, str(value).removeprefix("torch."))


def _memory_format(value: torch.memory_format, ref: Ref, depth: int) -> Wire:
    return _named(v.MEMORY_FORMAT, str(value).removeprefix("torch."))


def _named(tag: int, name: str) -> Wire:
    if name not in _CONSTANTS[tag]:
        raise TypeError(
            f"torch.{name} does not travel: quantised and sparse tensors have no wire form"
        )
    return [tag, name]


def _device(value: torch.device, ref: Ref, depth: int) -> Wire:
    if value.type == "meta":
        raise TypeError("a worker has no meta device")
    return [v.DEVICE, str(value)]


_Encoder: TypeAlias = Callable[[Any, Ref, int], Wire]
_ENCODERS: Final[Mapping[type, _Encoder]] = MappingProxyType(
    {
        int: _int,
        str: _str,
        list: _items(v.LIST),
        tuple: _items(v.TUPLE),
        torch.Size: _items(v.SIZE),
        dict: _dict,
        slice: _slice,
        EllipsisType: lambda *_: [v.ELLIPSIS],
        complex: lambda value, *_: [v.COMPLEX, value.real, value.imag],
        torch.dtype: _dtype,
        torch.device: _device,
        torch.layout: _layout,
        torch.memory_format: _memory_format,
    }
)
#: ``x.to(float)`` is ``x.to(torch.float64)``.
_PYTHON_TYPES: Final = MappingProxyType(
    {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
)


def _as(plain: Callable[[Any], Any]) -> _Encoder:
    return lambda value, ref, depth: _encode(plain(value), ref, depth)


def _related(value: Any) -> _Encoder:
    """The encoder of what is not exactly one of the types above, but is meant as one."""
    if type(value) is type and value in _PYTHON_TYPES:
        return _as(_PYTHON_TYPES.__getitem__)
    for plain in (float, int, complex, str):  # numpy's float64, complex128, str_; an enumeration
        if isinstance(value, plain):
            return _as(plain)
    for collection in (tuple, list, dict):  # a named tuple, an ordered dictionary
        if isinstance(value, collection):
            return _ENCODERS[collection]
    if isinstance(value, range):
        return _ENCODERS[list]
    if type(value).__name__ == "LinearCrossEntropyOptions":  # its guard makes it again
        return _as(dataclasses.asdict)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return _as(lambda value: value.item())
    raise TypeError(_why_not(value))


def _why_not(value: Any) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, torch.Generator):
        return f"{name} does not travel: seed the session with worker.manual_seed(n)"
    if isinstance(value, torch.nn.Module):
        return f"{name} does not travel as an argument: send the module with worker.send(module)"
    if name == "numpy.ndarray":
        return f"{name} does not travel: write torch.from_numpy(array)"
    if callable(value):
        return f"{name} does not travel: a worker runs no code of the client's"
    if hasattr(value, "read") or hasattr(value, "write") or hasattr(value, "__fspath__"):
        return f"{name} does not travel: a worker opens no files for a client"
    return f"{name} does not travel to a worker"


# --- worker: from wire form -----------------------------------------------------------------------


def decode(wire: Any, resolve: Resolve, device: torch.device) -> Any:
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


def _decode(wire: Any, resolve: Resolve, device: torch.device, depth: int) -> Any:
    kind = type(wire)
    if kind is float or kind is bool or wire is None:
        return wire
    if kind is int:
        return wire if wire in _INT_RANGE else _malformed("an integer has more than 64 bits")
    if kind is str:
        return wire if len(wire) <= limits.MAX_TEXT else _malformed("a text is too long")
    if kind is not list or not wire or type(wire[0]) is not int:
        _malformed(f"{kind.__name__} is no argument")
    tag = wire[0]
    if tag == v.REF:
        if len(wire) != 2 or type(wire[1]) is not int:
            _malformed("a reference is an identifier")
        return resolve(wire[1])
    if depth >= limits.MAX_DEPTH or len(wire) > MAX_ITEMS + 1:
        _malformed("an argument is too deep or too long")
    if tag in _CONSTANTS:
        return _constant(tag, wire)
    if tag == v.DEVICE:
        return _device_named(wire, device)
    items = [_decode(item, resolve, device, depth + 1) for item in wire[1:]]
    return _collection(tag, items)


def _collection(tag: int, items: list[Any]) -> Any:
    if tag == v.LIST:
        return items
    if tag == v.TUPLE:
        return tuple(items)
    if tag == v.SLICE and len(items) == 3 and all(isinstance(item, _BOUNDS) for item in items):
        return slice(*items)
    if tag == v.DICT and len(items) % 2 == 0 and all(type(key) is str for key in items[::2]):
        made = dict(zip(items[::2], items[1::2], strict=True))
        return made if 2 * len(made) == len(items) else _malformed("a key comes twice")
    if tag == v.SIZE and all(type(item) is int for item in items):
        return _size(items)
    if tag == v.COMPLEX and len(items) == 2 and all(type(item) in _REAL for item in items):
        return complex(*items)
    if tag == v.ELLIPSIS and not items:
        return ...
    _malformed(f"there is no such argument (tag {tag})")


#: What a complex number is made of; a JavaScript peer packs 1.0 as an integer.
_REAL: Final = (int, float)
#: What a slice is made of.
_BOUNDS: Final = (int, torch.Tensor, type(None))


def _size(items: list[int]) -> torch.Size:
    try:
        return torch.Size(items)
    except (OverflowError, RuntimeError, TypeError):
        _malformed("a size has more than 63 bits")


def _constant(tag: int, wire: list[Any]) -> Any:
    name = wire[1] if len(wire) == 2 else None
    if type(name) is not str or name not in _CONSTANTS[tag]:
        shown = ascii(name[:40]) if type(name) is str else type(name).__name__
        _malformed(f"{shown} is no dtype, layout or memory format that travels")
    return _CONSTANTS[tag][name]


def _device_named(wire: list[Any], device: torch.device) -> torch.device:
    name = wire[1] if len(wire) == 2 else None
    if type(name) is not str or len(name) > 40:
        _malformed("a device is named by a short text")
    if name in (device.type, str(device)):
        return device
    if name == "cpu":
        return torch.device("cpu")
    raise OpNotAllowed(f"this worker computes on {device}, not on {name!a}")


def _malformed(reason: str) -> NoReturn:
    raise RemoteProtocolError("malformed", reason)
