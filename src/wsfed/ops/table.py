"""The frozen table: wire name → what to call, and the rules that go with it.

A name is torch's public one, as ``torch.overrides.resolve_name`` gives it. Looking one up is one
dict access; the dots in it are never walked. The table holds what the installed torch has of the
checked-in list (:mod:`wsfed.ops.names`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, Final, NoReturn

import torch

from wsfed.errors import OpNotAllowed
from wsfed.ops import names, refused
from wsfed.ops.guards import guarded
from wsfed.ops.refused import REFUSED

__all__ = ["OPS", "REFUSED", "Op", "depends_on_floats", "lookup", "wire_name"]

#: Keywords that no operation takes from a client.
_REFUSED_KEYWORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "out": "results have identifiers of their own; assign with copy_",
        "generator": "a session draws from its own; seed it with worker.manual_seed",
        "pin_memory": "the worker's memory is its owner's",
    }
)

#: What functions written in Python call the tensor they change.
_FIRST: Final = frozenset({"self", "input", "tensor"})

#: Keywords that have to be looked at.
_CAREFUL: Final = frozenset({*_REFUSED_KEYWORDS, *_FIRST, "device"})

#: The shape of the result depends on a fractional number.
_BY_FLOATS: Final = frozenset(
    {
        "torch.nn.functional.fractional_max_pool2d",
        "torch.nn.functional.fractional_max_pool2d_with_indices",
        "torch.nn.functional.fractional_max_pool3d",
        "torch.nn.functional.fractional_max_pool3d_with_indices",
        "torch.nn.functional.interpolate",
        "torch.nn.functional.upsample",
        "torch.nn.functional.upsample_bilinear",
        "torch.nn.functional.upsample_nearest",
    }
)

#: Characters of an unknown name that an error repeats.
_MOST_SHOWN: Final = 100


@dataclass(frozen=True, slots=True)
class Op:
    """An operation.

    Attributes:
        name: on the wire.
        call: torch's function, behind a guard where its kernel trusts its arguments.
        random: whether it draws from torch's default generator.
        carries_rows: whether its results hold rows of its arguments (views, copies, element-wise).
        inplace: whether it changes its first argument.
    """

    name: str
    call: Callable[..., Any]
    random: bool
    carries_rows: bool
    inplace: bool

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Whether these keywords may be given.

        Raises:
            OpNotAllowed: one of them may not.
        """
        if _CAREFUL.isdisjoint(kwargs):
            return
        for keyword in _REFUSED_KEYWORDS.keys() & kwargs.keys():
            if kwargs[keyword] is not None and kwargs[keyword] is not False:
                self._refuse(f"{keyword}= is refused: {_REFUSED_KEYWORDS[keyword]}")
        if type(kwargs.get("device")) is str:
            self._refuse("device= takes a torch.device")
        if self.inplace and _FIRST & kwargs.keys():
            self._refuse("what it changes is its first argument, not a keyword")

    def _refuse(self, why: str) -> NoReturn:
        raise OpNotAllowed(why, op=self.name)


def lookup(name: str) -> Op:
    """The operation of that name.

    Raises:
        OpNotAllowed: it is refused, with the reason, or unknown.
    """
    op = OPS.get(name) if type(name) is str else None
    if op is not None:
        return op
    if type(name) is not str:
        raise OpNotAllowed(f"an operation is named by text, not by {type(name).__name__}")
    shown = ascii(name[:_MOST_SHOWN])[1:-1] + ("..." if len(name) > _MOST_SHOWN else "")
    why = refused.reason(name) or "a worker knows no operation of that name"
    raise OpNotAllowed(why, op=shown)


def wire_name(function: Callable[..., Any]) -> str | None:
    """What a function of torch's is called on the wire; ``None`` where it is not in the table."""
    return _NAMES.get(function)


def depends_on_floats(name: str) -> bool:
    """Whether what kind of result it gives depends on a fractional number among the arguments.

    A dropout of nothing gives its argument itself.
    """
    return name in _BY_FLOATS or name in _RANDOM


# --- building it, from what is checked in ---------------------------------------------------------

_PLACES: Final[Mapping[str, ModuleType | type]] = MappingProxyType(
    {
        "torch": torch,
        "torch.Tensor": torch.Tensor,
        "torch.nn.functional": torch.nn.functional,
        "torch.functional": torch.functional,
        "torch.linalg": torch.linalg,
        "torch.fft": torch.fft,
        "torch.special": torch.special,
        "torch.autograd": torch.autograd,
        "torch._C._nn": torch._C._nn,
    }
)


def _listed() -> Iterator[tuple[str, Callable[..., Any]]]:
    for space, words in names.NAMES.items():
        for word in words.split():
            found: Any = _PLACES[space]
            for part in word.split("."):
                found = getattr(found, part, None)
            if callable(found):
                yield f"{space}.{word}", found


def _changes_first(name: str) -> bool:
    word = name.rsplit(".", 1)[-1]
    if word.startswith("__"):
        is_inplace = word[2] == "i" and word != "__invert__"
        return is_inplace or word in ("__set__", "__setitem__")
    return word.endswith("_")


def _build(functions: Mapping[str, Callable[..., Any]]) -> Mapping[str, Op]:
    rows = frozenset(names.ROWS.split())
    return MappingProxyType(
        {
            name: Op(name, guarded(name, call), name in _RANDOM, name in rows, _changes_first(name))
            for name, call in functions.items()
        }
    )


_RANDOM: Final = frozenset(names.RANDOM.split())
_FUNCTIONS: Final = dict(_listed())
#: The table.
OPS: Final[Mapping[str, Op]] = _build(_FUNCTIONS)
# One function may have several names: the first wins.
_NAMES: Final[Mapping[Callable[..., Any], str]] = MappingProxyType(
    {call: name for name, call in reversed(_FUNCTIONS.items())}
    # What these call when they are given a list, in which torch looks for no subclass.
    | {
        getattr(torch._VF, word): f"torch.functional.{word}"
        for word in ("atleast_1d", "atleast_2d", "atleast_3d", "meshgrid")
    }
)
