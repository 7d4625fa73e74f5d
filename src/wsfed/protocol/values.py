"""How a Python argument looks on the wire.

``None``, ``bool``, ``int`` (64 bits), ``float`` and ``str`` travel as themselves. Everything
else is a msgpack array whose first item is one of the tags below (a plain small integer: an
extension type costs four times as much to unpack). So an array on the wire is never a bare list,
and a reader always knows what it looks at.

The tags are shared by every implementation of the protocol; the halves that turn tensors'
own types (dtypes, devices, layouts) into them are in :mod:`wsfed.ops.arguments`.
"""

from __future__ import annotations

from typing import TypeAlias

__all__ = [
    "COMPLEX",
    "DEVICE",
    "DICT",
    "DTYPE",
    "ELLIPSIS",
    "LAYOUT",
    "LIST",
    "MEMORY_FORMAT",
    "REF",
    "SIZE",
    "SLICE",
    "TUPLE",
    "Wire",
]

#: ``[REF, id]``: an object of the session.
REF = 0
#: ``[LIST, *items]``
LIST = 1
#: ``[TUPLE, *items]``
TUPLE = 2
#: ``[DICT, key, value, key, value, ...]``, the keys text.
DICT = 3
#: ``[SLICE, start, stop, step]``
SLICE = 4
#: ``[ELLIPSIS]``
ELLIPSIS = 5
#: ``[DTYPE, "float32"]``: torch's name without the ``torch.``
DTYPE = 6
#: ``[DEVICE, "cpu"]``
DEVICE = 7
#: ``[COMPLEX, real, imaginary]``
COMPLEX = 8
#: ``[LAYOUT, "strided"]``
LAYOUT = 9
#: ``[MEMORY_FORMAT, "channels_last"]``
MEMORY_FORMAT = 10
#: ``[SIZE, *integers]``: a ``torch.Size``
SIZE = 11

#: What msgpack can carry without extension types.
Wire: TypeAlias = (
    bool | int | float | str | bytes | list["Wire"] | tuple["Wire", ...] | dict[str, "Wire"] | None
)
