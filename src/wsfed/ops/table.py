"""The frozen table: wire name → what to call, and the rules that go with it.

A name is torch's public one, as ``torch.overrides.resolve_name`` gives it. Looking one up is one
dict access; the dots in it are never walked. The table holds what the installed torch has of the
checked-in list (:mod:`wsfed.ops.names`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, Final

import torch

from wsfed.errors import OpNotAllowed
from wsfed.ops import names, refused

__all__ = ["OPS", "Op", "depends_on_floats", "lookup", "wire_name"]

#: Keywords that no operation takes from a client.
_REFUSED_KEYWORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "out": "results have identifiers of their own; assign with copy_",
        "generator": "a session draws from its own; seed it with worker.manual_seed",
        "pin_memory": "the worker's memory is its owner's",
    }
)

#: The shape of the result depends on a fractional number.
_BY_FLOATS: Final = frozenset(
    {
        "torch.nn.functional.interpolate",
        "torch.nn.functional.fractional_max_pool2d",
        "torch.nn.functional.fractional_max_pool3d",
        "torch.nn.functional.fractional_max_pool2d_with_indices",
        "torch.nn.functional.fractional_max_pool3d_with_indices",
    }
)


@dataclass(frozen=True, slots=True)
class Op:
    """An operation.

    Attributes:
        name: on the wire.
        call: torch's function.
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
        for keyword in _REFUSED_KEYWORDS.keys() & kwargs.keys():
            if kwargs[keyword] is not None and kwargs[keyword] is not False:
                raise OpNotAllowed(f"{keyword}= is refused: {_REFUSED_KEYWORDS[keyword]}", op=self.name)


def lookup(name: str) -> Op:
    """The operation of that name.

    Raises:
        OpNotAllowed: it is refused, with the reason, or unknown.
    """
    op = OPS.get(name) if type(name) is str else None
    if op is None:
        shown = name[:100] if type(name) is str else type(name).__name__
        why = refused.reason(shown) or "a worker knows no operation of that name"
        raise OpNotAllowed(why, op=shown)
    return op


def wire_name(function: Callable[..., Any]) -> str | None:
    """What a function of torch's is called on the wire; ``None`` where it is not in the table."""
    return _NAMES.get(function)


def depends_on_floats(name: str) -> bool:
    """Whether the shape of the result depends on a fractional number among the arguments."""
    return name in _BY_FLOATS


# --- building it, from what is checked in -----------------------------------------------------------

_PLACES: Final[Mapping[str, ModuleType | type]] = MappingProxyType(
    {
        "torch": torch,
        "torch.Tensor": torch.Tensor,
        "torch.nn.functional": torch.nn.functional,
        "torch.functional": torch.functional,
        "torch.linalg": torch.linalg,
        "torch.fft": torch.fft,
        "torch.special": torch.special,
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
        is_inplace = word[2] == "i" and word not in ("__invert__", "__index__", "__int__")
        return is_inplace or word in ("__set__", "__setitem__")
    return word.endswith("_")


def _build() -> Mapping[str, Op]:
    random, rows = frozenset(names.RANDOM.split()), frozenset(names.ROWS.split())
    return MappingProxyType(
        {
            name: Op(name, call, name in random, name in rows, _changes_first(name))
            for name, call in _listed()
        }
    )


#: The table.
OPS: Final[Mapping[str, Op]] = _build()
# One function may have several names (torch.absolute is torch.abs on some builds): the first wins.
_NAMES: Final[Mapping[Callable[..., Any], str]] = MappingProxyType(
    {op.call: name for name, op in reversed(OPS.items())}
)
