"""What a plan will do for batch after batch of a data set, said before the first one runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from wsfed.pointers.kept import Step
from wsfed.pointers.link import Link
from wsfed.pointers.plan import Plan
from wsfed.pointers.pointer import Pointer
from wsfed.pointers.recording import Recording
from wsfed.pointers.site import Site
from wsfed.pointers.stepping import let_go, own_state, set_own_state

__all__ = ["Ahead", "Segment"]


@dataclass(slots=True)
class Segment:
    """The same program with the same inputs, for a number of batches.

    Attributes:
        step: what runs.
        count: for how many batches.
        rows: the numbers of each batch, or once those of all.
    """

    step: Step
    count: int
    rows: list[list[float]]

    def wire(self, link: Link, fields: Mapping[int, int], site: Site | None) -> list[Any]:
        """As :class:`~wsfed.protocol.messages.RunOver` has it."""
        step = self.step
        inputs = [-fields[id] if id in fields else id for id in step.inputs]
        results = len(step.kept.wanted)
        outs = [0] * results + step.outs[results:]
        return [step.assembled.ship(link, site), self.count, inputs, len(self.rows), outs]


class Ahead:
    """Says beforehand what a plan does for batch after batch of a data set.

    An optimizer's numbers are asked for batch by batch, as long as its own state changes with them.

    Args:
        plan: to run.
        make: gives pointers for a batch of so many rows, which stand for its fields.
        bring: makes the first batch for these pointers, where no run does it.

    Attributes:
        segments: what was said so far.
        is_steady: whether all steps are alike, so that no optimizer counts them here.
    """

    def __init__(
        self,
        plan: Plan[..., Any],
        make: Callable[[int], list[Pointer]],
        bring: Callable[[list[Pointer]], None],
    ) -> None:
        self._plan, self._make, self._bring = plan, make, bring
        self.segments: list[Segment] = []
        self._recordings: list[Recording] = []
        self._fields: dict[int, list[Pointer]] = {}
        self._steps: dict[int, Step] = {}
        self.is_steady = False
        self._before: Any = None
        self._first: Any = None

    def batch(self, rows: int, site: Site | None) -> Step:
        """One batch more."""
        step = self._steps.get(rows) if self.is_steady else None
        if step is None:
            step = self._advance(rows, site)
        last = self.segments[-1] if self.segments else None
        if last is not None and _are_alike(last.step, step):
            last.count += 1
            if len(last.rows) > 1 or last.rows[0] != step.numbers:
                last.rows += [last.rows[0]] * (last.count - 1 - len(last.rows))
                last.rows.append(step.numbers)
        else:
            self.segments.append(Segment(step, 1, [step.numbers]))
        return step

    def _advance(self, rows: int, site: Site | None) -> Step:
        known = self._steps.get(rows)
        if known is not None and (numbers := self._quick(known)) is not None:
            if numbers == known.numbers and own_state(known.optimizers) == self._before:
                self.is_steady = True
            return replace(known, numbers=numbers)
        if rows not in self._fields:
            self._fields[rows] = self._make(rows)
        call = self._plan._read(tuple(self._fields[rows]), {}, site)
        fields = self._fields[rows]
        step = self._plan._advance(call, is_next=not self._steps, bring=lambda: self._bring(fields))
        self._recordings.append(step.recording)
        state = own_state(step.optimizers)
        if self._first is None:
            self._first = state
        self.is_steady = state == self._before and not step.has_extra
        self._before = state
        self._steps[rows] = step
        return step

    def _quick(self, known: Step) -> list[float] | None:
        """The numbers of one batch more, where they are all that changes."""
        if len(known.optimizers) != 1 or known.has_extra:
            return None
        stepper = self._plan._stepper(known.optimizers[0])
        recording = Recording(self._plan.name, known.recording.link)
        numbers = stepper.quick(recording)
        recording.end()
        if numbers is None:
            self._steps.clear()  # they are of another branch of the optimizer's
        return numbers

    def fields(self, rows: int) -> list[int]:
        """What stands for the fields of a batch of so many rows."""
        return [each._handle.id for each in self._fields[rows]]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that step in it."""
        return self.segments[0].step.optimizers

    @property
    def total(self) -> int:
        """Batches."""
        return sum(segment.count for segment in self.segments)

    def run_first(self, rows: int, site: Site | None) -> None:
        """Have the first batch run by itself: what is known here of it is true then."""
        self._bring(self._fields[rows])
        self._steps[rows].run(site)

    def end(self) -> None:
        """The command was issued."""
        for recording in self._recordings:
            recording.end()

    def ended_after(self, done: int) -> None:
        """Only so many batches were done: have the optimizers count as many steps."""
        optimizers = self.segments[0].step.optimizers
        if done >= self.total or not optimizers or self.is_steady:
            return
        for optimizer in optimizers:
            let_go(optimizer)
        set_own_state(optimizers, self._first)
        link = self.segments[0].step.recording.link
        for _ in range(max(done, 1) - 1):
            recording = Recording(self._plan.name, link)
            for optimizer in optimizers:
                self._plan._stepper(optimizer).step(recording)
            recording.end()


def _are_alike(one: Step, other: Step) -> bool:
    if one is other:
        return not one.has_extra
    return (
        one.assembled is other.assembled
        and one.inputs == other.inputs
        and not (one.has_extra or other.has_extra)
    )
