"""What a worker may answer to each request; anything else breaks the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from wsfed.errors import RemoteProtocolError
from wsfed.pointers.shapes import Meta
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import ITEM_SIZES
from wsfed.protocol.stream import Incoming
from wsfed.tensors import DTYPES

__all__ = ["check_tensor", "check_value"]


def check_value(command: int, value: Any) -> None:
    """Whether a request of this code may be answered with this value.

    Raises:
        RemoteProtocolError: it may not.
    """
    if not _VALUES.get(command, _is_never)(value):
        raise _unfit(command)


def check_tensor(
    command: int, received: Incoming, meta: Meta | None, *, requires_grad: bool
) -> None:
    """Whether a request of this code, for a tensor like ``meta``, may be answered with this one.

    Raises:
        RemoteProtocolError: it may not.
    """
    floating = "float" in received.dtype or "complex" in received.dtype
    if command == m.SecAgg.code and (
        requires_grad or received.dtype not in ("uint8", "int32") or len(received.shape) != 1
    ):
        raise _unfit(command)
    if command not in (m.Get.code, m.SecAgg.code) or (requires_grad and not floating):
        raise _unfit(command)
    if meta is not None and (received.shape, DTYPES[received.dtype]) != (meta.shape, meta.dtype):
        raise RemoteProtocolError(
            "unfit-answer",
            f"a {received.dtype}{list(received.shape)} came where a "
            f"{str(meta.dtype).removeprefix('torch.')}{list(meta.shape)} was asked for",
        )


def _unfit(command: int) -> RemoteProtocolError:
    name = m.BY_CODE[command].__name__
    return RemoteProtocolError("unfit-answer", f"the answer to a {name} is not one")


def _is_never(value: Any) -> bool:
    return False


def _is_nothing(value: Any) -> bool:
    return value is None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= limits.MAX_ID


def _are_sizes(value: Any) -> bool:
    return type(value) is list and len(value) <= limits.MAX_DIMENSIONS and all(map(_is_size, value))


def _is_description(value: Any) -> bool:
    return (
        type(value) is dict
        and value.get("dtype") in ITEM_SIZES
        and _are_sizes(value.get("shape"))
        and _are_sizes(value.get("stride"))
        and len(value["shape"]) == len(value["stride"])
        and type(value.get("requires_grad")) is bool
        and type(value.get("is_leaf")) is bool
    )


def _is_found(value: Any) -> bool:
    return (
        type(value) is dict
        and type(value.get("objects")) is list
        and all(_is_description(each) and _is_size(each.get("id")) for each in value["objects"])
        and type(value.get("datasets")) is list
        and all(type(name) is str for name in value["datasets"])
    )


def _is_dataset(value: Any) -> bool:
    return (
        type(value) is dict
        and type(value.get("name")) is str
        and _is_size(value.get("rows"))
        and type(value.get("open")) is bool
        and type(value.get("fields")) is list
        and all(_is_field(each, value["rows"]) for each in value["fields"])
    )


def _is_end_of_run(value: Any) -> bool:
    return (
        type(value) is dict
        and _is_size(value.get("done"))
        and value.get("stopped") in ("", "stop", "until")
    )


def _is_field(value: Any, rows: int) -> bool:
    return (
        type(value) is list
        and len(value) == 3
        and type(value[0]) is str
        and value[1] in ITEM_SIZES
        and _are_sizes(value[2])
        and value[2][:1] == [rows]
    )


#: What the answer to a command without a tensor has to be, by the command's code.
_VALUES: Final[Mapping[int, Callable[[Any], bool]]] = MappingProxyType(
    {
        m.Describe.code: _is_description,
        m.Flush.code: _is_nothing,
        m.Move.code: _is_nothing,
        m.OpenDataset.code: _is_dataset,
        m.RunOver.code: _is_end_of_run,
        m.Search.code: _is_found,
    }
)
