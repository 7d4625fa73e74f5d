"""What is made better in a program before it runs; the bits of its results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from wsfed.ops.table import OPS
from wsfed.plans.program import made, refs
from wsfed.protocol import messages as m
from wsfed.protocol import modes
from wsfed.protocol import values as v

__all__ = ["Fused", "free_early", "fuse", "side_by_side", "without_dead_code"]

_EXECUTE: Final = m.Execute.code


def without_dead_code(steps: Sequence[list[Any]], results: Sequence[int]) -> list[list[Any]]:
    """Leave out what makes something that nobody uses and changes nothing.

    Left out are only operations of which this is certain: views, copies and element-wise ones that
    draw no random numbers and write to nothing.
    """
    needed, kept = set(results), list[list[Any]]()
    for step in reversed(steps):
        if _is_pure(step) and needed.isdisjoint(made(step)):
            continue
        needed.update(refs(step))
        kept.append(step)
    return kept[::-1]


def _is_pure(step: list[Any]) -> bool:
    if step[0] != _EXECUTE:
        return bool(step[0] == m.Clone.code)
    _, name, outs, args, kwargs, _ = step
    op = OPS.get(name)
    if op is None or not outs or not op.carries_rows or op.inplace or op.random:
        return False
    # inplace=True, as a keyword or in its place
    return "inplace" not in kwargs and True not in [arg for arg in args if type(arg) is bool]


def free_early(
    steps: Sequence[list[Any]], results: Sequence[int], first_made: int
) -> list[list[Any]]:
    """Forget each slot behind the last step that uses it."""
    last: dict[int, int] = {}
    for place, step in enumerate(steps):
        for slot in (*refs(step), *made(step)):
            last[slot] = place
    ends: dict[int, list[int]] = {}
    for slot, place in last.items():
        if slot >= first_made and slot not in results:
            ends.setdefault(place, []).append(slot)
    freed: list[list[Any]] = []
    for place, step in enumerate(steps):
        freed.append(step)
        if place in ends:
            freed.append([m.Delete.code, sorted(ends[place])])
    return freed


#: Operations whose lists torch works off one by one on the CPU, with the same arithmetic.
_FOREACH: Final = frozenset({"add_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_"})
_PREFIX: Final = "torch.Tensor."


@dataclass(frozen=True, slots=True)
class Fused:
    """One call instead of several: ``torch._foreach_…``.

    Attributes:
        word: what it is called there.
        columns: of each argument the slots, or one slot of a number that all have in common.
        words: keyword arguments, each a slot of a number.
        mode: that it runs in.
    """

    word: str
    columns: list[list[int] | int]
    words: dict[str, int]
    mode: int


def fuse(
    steps: Sequence[list[Any]], is_number: Callable[[int], bool]
) -> Iterator[tuple[list[Any] | Fused, int]]:
    """Neighbours that update a tensor each, independently, become one call for all of them.

    Gives each command with its place.
    """
    group: list[list[Any]] = []
    key: tuple[Any, ...] | None = None
    written: set[int] = set()
    for place, step in enumerate(steps):
        kind = _alike(step, is_number)
        if group and (kind != key or not written.isdisjoint(refs(step))):
            yield _fused(group, is_number), place - len(group)
            group, written = [], set()
        if kind is None:
            yield step, place
        else:
            group.append(step)
            written.add(step[2][0])
        key = kind
    if group:
        yield _fused(group, is_number), len(steps) - len(group)


def _fused(group: list[list[Any]], is_number: Callable[[int], bool]) -> list[Any] | Fused:
    first = group[0]
    if len(group) == 1:
        return first
    columns: list[list[int] | int] = [
        slots[0] if is_number(slots[0]) else list(slots)
        for slots in zip(*([arg[1] for arg in step[3]] for step in group), strict=True)
    ]
    words = {word: arg[1] for word, arg in first[4].items()}
    return Fused(f"_foreach_{first[1].removeprefix(_PREFIX)}", columns, words, first[5])


def _alike(step: list[Any], is_number: Callable[[int], bool]) -> tuple[Any, ...] | None:
    """What neighbours have to have in common to be fused; ``None`` for what is not fused."""
    if step[0] != _EXECUTE or not step[1].startswith(_PREFIX):
        return None
    _, name, outs, args, kwargs, mode = step
    if name.removeprefix(_PREFIX) not in _FOREACH or mode != modes.NO_GRAD:
        return None
    if not all(type(arg) is list and arg[0] == v.REF for arg in (*args, *kwargs.values())):
        return None
    if outs != [args[0][1]] or is_number(args[0][1]):  # the tensor it gives is the one it changes
        return None
    numbers = tuple(arg[1] if is_number(arg[1]) else 0 for arg in args)
    words = tuple((word, arg[1]) for word, arg in kwargs.items())
    if not all(is_number(slot) for _, slot in words):
        return None
    return name, numbers, words


def side_by_side(steps: Sequence[list[Any]], is_number: Callable[[int], bool]) -> list[list[Any]]:
    """The steps of an optimizer with those of all parameters next to each other, to be fused.

    A step depends on the steps before it with which it has a tensor in common, which parameters of
    an optimizer have not.
    """
    level: dict[int, int] = {}
    ranked = []
    for place, step in enumerate(steps):
        touched = {slot for slot in (*refs(step), *made(step)) if not is_number(slot)}
        rank = 1 + max((level.get(slot, 0) for slot in touched), default=0)
        level.update(dict.fromkeys(touched, rank))
        ranked.append((rank, step[1] if step[0] == _EXECUTE else "", place))
    return [steps[place] for *_, place in sorted(ranked)]
