"""``torch.Tensor`` to wire form and back: the first layer that knows torch.

What goes out is a contiguous copy of the logical view, never the storage behind it, made at once:
the caller may change the tensor in the next line. What comes in is memory of torch's own, aligned
to 64 bytes as torch aligns, because the matrix kernels promise equal bits only for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch

from wsfed.errors import PointerError
from wsfed.protocol.codec import ITEM_SIZES, Outgoing
from wsfed.protocol.stream import Incoming

__all__ = [
    *("DTYPES", "DTYPE_NAMES", "allocate", "describe", "hash_of", "incoming", "outgoing"),
    "snapshot",
]

#: torch's dtype by its name on the wire.
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {name: getattr(torch, name) for name in ITEM_SIZES}
)
#: The name on the wire by torch's dtype.
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {dtype: name for name, dtype in DTYPES.items()}
)


def describe(tensor: torch.Tensor) -> str:
    """Dtype and shape as errors show them, such as ``float32[2, 3]``; never a value."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def allocate(nbytes: int) -> memoryview | None:
    """Uninitialised memory, to be overwritten whole; ``None`` if none is left."""
    try:
        return _bytes_of(torch.empty(nbytes, dtype=torch.uint8))
    except RuntimeError:  # what torch's allocator raises
        return None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array)


def check_wire(tensor: torch.Tensor) -> None:
    """Whether a tensor has a wire form.

    Raises:
        PointerError: layout or dtype has none (sparse, quantised, nested, meta).
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = str(tensor.layout).removeprefix("torch.")
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else kind
        raise PointerError(f"a {kind} tensor has no wire form; make it dense first")
    if tensor.is_meta:
        raise PointerError("a tensor on the meta device has no values to send")
    if tensor.dtype not in DTYPE_NAMES:
        raise PointerError(f"{tensor.dtype} has no wire form")


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """An independent, contiguous copy in the machine's memory, outside autograd.

    Raises:
        PointerError: it has no wire form.
    """
    check_wire(tensor)
    with torch.no_grad():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        return copy.copy_(tensor.detach())


def hash_of(tensors: Sequence[torch.Tensor]) -> bytes:
    """SHA-256 of dtypes, shapes and values: what a model is, to those who were given it."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{DTYPE_NAMES[tensor.dtype]}{list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            found.update(plain.view(torch.uint8).numpy().data)
    return found.digest()


def outgoing(tensor: torch.Tensor, *, lasting: bool = False) -> Outgoing:
    """A snapshot of ``tensor``, ready to be sent.

    Args:
        tensor: what is to be sent.
        lasting: nobody changes it any more, so it is sent from where it is, if that can be.

    Raises:
        PointerError: the tensor has no wire form.
    """
    is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if lasting and is_plain and tensor.is_contiguous() and not tensor.is_conj():
        check_wire(tensor)
        copy = tensor.detach()
    else:
        copy = snapshot(tensor)
    name = DTYPE_NAMES[copy.dtype]
    if copy.numel() == 0:
        return Outgoing(name, tuple(copy.shape), memoryview(b""))
    if copy.dtype.is_complex:
        copy = torch.view_as_real(copy)
    data = _bytes_of(copy.reshape(-1).view(torch.uint8))
    return Outgoing(name, tuple(tensor.shape), data)


def incoming(received: Incoming) -> torch.Tensor | None:
    """The tensor that came, or ``None`` where there was no room for it."""
    dtype = DTYPES[received.dtype]
    if received.data is None:
        return None
    if received.nbytes == 0:
        return torch.empty(received.shape, dtype=dtype)
    data = received.data
    if data.readonly:  # inside a message: copy it out, so that it is aligned and writable
        memory = allocate(received.nbytes)
        if memory is None:
            return None
        memory[:] = data
        data = memory
    # The data of a view is no view: autocast, and what writes into a leaf, look at that.
    return torch.frombuffer(data, dtype=dtype).view(received.shape).data
