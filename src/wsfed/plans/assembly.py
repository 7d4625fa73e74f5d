"""Parts put together: what a recording noted, as one program with one numbering of slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, TypeAlias

from wsfed.plans.passes import free_early, side_by_side, without_dead_code
from wsfed.plans.program import Constant, Program, Spec, renamed
from wsfed.protocol import messages as m
from wsfed.tensors import DTYPES

__all__ = ["CAPTURE", "CONSTANT", "MADE", "NUMBER", "Piece", "assemble"]

#: Kinds of slots of a part: ``4 * ordinal + kind``.
CAPTURE, NUMBER, CONSTANT, MADE = range(1, 5)

#: Parameters up to this size are updated side by side; larger ones stay in the cache if the update
#: of each is finished before the next one's begins.
_SMALL: Final = 256 * 1024

#: A place in an earlier part: the number of the part, and what it made.
Made: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part, as the assembly needs it.

    Attributes:
        commands: with the part's own slots.
        constants: that it met.
        numbers: that may be others at each run.
        captures: what it is given: the description of an input, or what an earlier part made.
        is_step: whether it is an optimizer's step.
    """

    commands: Sequence[list[Any]]
    constants: Sequence[Constant]
    numbers: Sequence[float]
    captures: Sequence[Spec | Made]
    is_step: bool


def assemble(
    pieces: Sequence[Piece], results: Sequence[Made], notes: Sequence[Sequence[Any]]
) -> tuple[Program, list[Any]]:
    """One program, and the note of each of its steps.

    Args:
        pieces: in order.
        results: what the program gives.
        notes: one for each command of each piece.
    """
    slots, first_made = _numbering(pieces)
    first = 1 + sum(isinstance(c, Spec) for piece in pieces for c in piece.captures)
    numbers = range(first, first + sum(len(piece.numbers) for piece in pieces))
    steps: list[list[Any]] = []
    noted: dict[int, Any] = {}
    for number, piece in enumerate(pieces):
        names = slots[number]
        renumbered = [renamed(command, names.__getitem__) for command in piece.commands]
        noted.update(zip(map(id, renumbered), notes[number], strict=True))
        if piece.is_step:
            small = {names[4 * k + CAPTURE] for k, c in enumerate(piece.captures) if _is_small(c)}
            if len(small) == len(piece.captures):
                renumbered = side_by_side(renumbered, numbers.__contains__)
        steps += renumbered
    wanted = [slots[number][4 * ordinal + MADE] for number, ordinal in results]
    kept = without_dead_code(steps, wanted)
    freed = free_early(kept, wanted, first_made)
    program = Program(
        tuple(c for piece in pieces for c in piece.captures if isinstance(c, Spec)),
        tuple(number for piece in pieces for number in piece.numbers),
        tuple(constant for piece in pieces for constant in piece.constants),
        tuple(freed),
        tuple(wanted),
    )
    return program, [noted.get(id(step)) for step in freed]


def _numbering(pieces: Sequence[Piece]) -> tuple[list[dict[int, int]], int]:
    """The program's slot of each slot of each part, and the first one that is made."""
    slots: list[dict[int, int]] = [{} for _ in pieces]
    later: list[tuple[int, int, Made]] = []
    top = 0
    for number, piece in enumerate(pieces):
        for ordinal, capture in enumerate(piece.captures):
            if isinstance(capture, Spec):
                top += 1
                slots[number][4 * ordinal + CAPTURE] = top
            else:
                later.append((number, ordinal, capture))
    for kind in (NUMBER, CONSTANT):
        for number, piece in enumerate(pieces):
            count = len(piece.numbers if kind == NUMBER else piece.constants)
            for ordinal in range(count):
                top += 1
                slots[number][4 * ordinal + kind] = top
    first_made = top + 1
    for number, piece in enumerate(pieces):
        for ordinal in range(_count_made(piece)):
            top += 1
            slots[number][4 * ordinal + MADE] = top
    for number, ordinal, (part, made) in later:
        slots[number][4 * ordinal + CAPTURE] = slots[part][4 * made + MADE]
    return slots, first_made


def _count_made(piece: Piece) -> int:
    found: set[int] = set()
    for command in piece.commands:
        bound = command[2] if command[0] == m.Execute.code else []
        bound = [command[2]] if command[0] == m.Clone.code else bound
        found.update(slot for slot in bound if slot % 4 == MADE % 4)
    return len(found)


def _is_small(capture: Spec | Made) -> bool:
    if not isinstance(capture, Spec):
        return False
    return prod(capture.shape) * DTYPES[capture.dtype].itemsize <= _SMALL
