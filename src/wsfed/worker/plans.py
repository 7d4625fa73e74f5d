"""The recorded programs of one session: kept, run once, run over a data set.

The first run of a program looks closely: at the size of each result before it is made, and at
whose rows the results hold. As everything about a program but the values is fixed, the runs after
it need neither.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import Any, Final

import torch

from wsfed.errors import NotFound, QuotaExceeded, RemoteError
from wsfed.plans.compiled import Compiled, Frame, Machine, Step
from wsfed.plans.program import Program, load
from wsfed.privacy.noise import unforeseeable
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.tensors import DTYPE_NAMES, DTYPES, describe
from wsfed.worker.datasets import Dataset
from wsfed.worker.policy import NO_LABELS, Labels, check_leaving, holds_rows
from wsfed.worker.sizes import ResultSizes, depends_on_values
from wsfed.worker.store import Failure, Poisoned, Store

__all__ = ["Over", "Programs", "Shelf", "StepFailed"]

_record: Final = torch._C._set_grad_enabled
#: Programs that a worker keeps for the next session that brings the same ones.
_KEPT: Final = 32
#: Batches that are reported in one message, at most.
_REPORTED: Final = 1000


class Programs:
    """What the sessions of one worker have in common: programs by their content."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[bytes, Compiled] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[bytes, Compiled] = OrderedDict()

    def compiled(self, packed: bytes, device: torch.device) -> Compiled:
        """The program, checked and made ready; raises as ``load`` and ``Compiled``."""
        key = sha256(packed).digest()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Compiled(load(packed), device)
        self._recent[key] = found
        if len(self._recent) > _KEPT:
            self._recent.popitem(last=False)
        return found


class StepFailed(Exception):
    """A step of a program failed.

    Attributes:
        step: which, from 1.
        name: of its operation.
        error: why.
        shapes: of what it was given.
        private: whether rows of a private data set were among it.
    """

    def __init__(
        self, step: int, name: str, error: Exception, shapes: Sequence[str], *, private: bool
    ) -> None:
        super().__init__(str(error))
        self.step, self.name, self.error = step, name, error
        self.shapes, self.private = shapes, private


@dataclass(slots=True)
class _Kept:
    """A program in a session."""

    compiled: Compiled
    sizes: list[tuple[torch.dtype, torch.Size]]
    #: What a run needs beside its inputs, in bytes; ``None`` before the first one.
    peak: int | None = None
    #: Labels of the results, by those of the inputs.
    labels: dict[tuple[Labels, ...], tuple[Labels, ...]] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        return self.compiled.program


class Shelf:
    """The programs of one session.

    Args:
        store: the session's objects.
        sizes: tells how large results will be.
        machine: runs what needs modes or random numbers.
        device: the worker's.
        programs: what its sessions have in common.
    """

    def __init__(
        self,
        store: Store,
        sizes: ResultSizes,
        machine: Machine,
        device: torch.device,
        programs: Programs,
    ) -> None:
        self._store, self._sizes, self._machine = store, sizes, machine
        self._device, self._programs = device, programs
        self._kept: dict[int, _Kept | Failure] = {}

    # --- keeping ---

    def define(self, plan: int, packed: bytes) -> None:
        """Keep a program.

        Raises:
            QuotaExceeded: there are too many.
            RemoteProtocolError: it is none.
            OpNotAllowed: it has an operation that is unknown or refused here.
        """
        if len(self._kept) >= limits.MAX_PLANS:
            raise QuotaExceeded(f"a session keeps at most {limits.MAX_PLANS:,} plans")
        compiled = self._programs.compiled(packed, self._device)
        sizes = [(DTYPES[s.dtype], torch.Size(s.shape)) for s in compiled.program.inputs]
        self._kept[plan] = _Kept(compiled, sizes)

    def poison(self, plan: int, failure: Failure) -> None:
        """Whoever runs this plan is told why it is not there."""
        if len(self._kept) < limits.MAX_PLANS:
            self._kept[plan] = failure

    def forget(self, ids: Sequence[int]) -> None:
        """Forget programs; unknown identifiers are passed over."""
        if self._kept:
            for id in ids:
                self._kept.pop(id, None)

    def _plan(self, plan: int) -> _Kept:
        kept = self._kept.get(plan)
        if kept is None:
            raise NotFound(f"there is no plan {plan} in this session")
        if isinstance(kept, Failure):
            raise Poisoned(kept)
        return kept

    # --- running ---

    def run(self, command: m.Run) -> None:
        """Run a program once and bind its results."""
        kept = self._plan(command.plan)
        tensors, labels = self._inputs(command.inputs)
        self.perform(kept, tensors, labels, command.numbers, command.outs)

    def _inputs(self, ids: Sequence[int]) -> tuple[list[Any], tuple[Labels, ...]]:
        entries = [self._store.entry(id) for id in ids]
        labels = tuple([entry.labels for entry in entries])
        return [entry.value for entry in entries], labels if any(labels) else ()

    def perform(
        self,
        kept: _Kept,
        tensors: Sequence[torch.Tensor],
        labels: tuple[Labels, ...],
        numbers: Sequence[float],
        outs: Sequence[int],
    ) -> list[tuple[torch.Tensor, Labels]]:
        """Run a program; gives its results with their labels, and binds those with identifiers.

        Raises:
            RemoteError: the inputs are not what it takes.
            QuotaExceeded: there is no room for what it makes.
            StepFailed: torch refused a step.
        """
        self._check(kept, tensors, numbers, outs)
        frame = kept.compiled.frame(self._machine, tensors, numbers)
        found: tuple[Labels, ...] | None = () if not labels else kept.labels.get(labels)
        if kept.peak is None or found is None:
            found = self._run_closely(kept, frame, labels)
        else:
            self._store.check_room(kept.peak)
            _run_fast(kept.compiled, frame, private=bool(labels))
        results: list[tuple[torch.Tensor, Labels]] = []
        for place, slot in enumerate(kept.program.results):
            result = (frame[slot], found[place] if found else NO_LABELS)
            if outs[place]:
                self._store.put(outs[place], *result)
            results.append(result)
        return results

    def _check(
        self, kept: _Kept, tensors: Sequence[Any], numbers: Sequence[float], outs: Sequence[int]
    ) -> None:
        program = kept.program
        wanted = (len(program.inputs), len(program.numbers), len(program.results))
        if (len(tensors), len(numbers), len(outs)) != wanted:
            raise RemoteError(
                f"it takes {wanted[0]} inputs and {wanted[1]} numbers and gives {wanted[2]} "
                f"results, not {len(tensors)}, {len(numbers)} and {len(outs)}"
            )
        for place, (tensor, (dtype, size)) in enumerate(zip(tensors, kept.sizes, strict=True)):
            if tensor.dtype is not dtype or tensor.shape != size:
                raise RemoteError(
                    f"input {place} has to be {program.inputs[place]}, not {describe(tensor)}"
                )

    def _run_closely(
        self, kept: _Kept, frame: Frame, labels: tuple[Labels, ...]
    ) -> tuple[Labels, ...]:
        """Run step by step; learn what it needs, and whose rows its results hold."""
        at = {slot: each for slot, each in enumerate(labels, 1) if each}
        live: dict[int, int] = {}
        total = peak = 0
        is_written = False
        for place, step in enumerate(kept.compiled.steps):
            try:
                peak = max(peak, total + self._step(step, frame, total))
            except Exception as error:
                _record(True)
                raise _failed(place, step, error, frame, private=bool(labels)) from error
            if step.name == "delete" and step.op is None:
                total -= sum(live.pop(slot, 0) for slot in step.uses)
            for slot in step.makes:
                total += frame[slot].nbytes - live.pop(slot, 0)
                live[slot] = frame[slot].nbytes
            is_written |= self._label(step, frame, at)
        if not any(step.op and depends_on_values(step.name) for step in kept.compiled.steps):
            kept.peak = max(peak, total)
        found = tuple(at.get(slot, NO_LABELS) for slot in kept.program.results)
        if labels and not is_written:
            kept.labels[labels] = found
        return found

    def _step(self, step: Step, frame: Frame, total: int) -> int:
        """Run a step if there is room for what it makes; gives how many bytes that may be."""
        if step.op is None or step.arguments is None or step.bind is None:
            step.run(frame)
            return 0
        args, kwargs = step.arguments(frame)
        size = self._sizes.of(step.op, args, kwargs)
        if size:
            self._store.check_room(total + size)
        step.bind(frame, self._machine.call(step.op, args, kwargs, step.mode))
        for slot in step.makes:
            if frame[slot].layout is not torch.strided or frame[slot].dtype not in DTYPE_NAMES:
                kind = f"{frame[slot].dtype}, {frame[slot].layout}"
                raise RemoteError(f"its result ({kind}) has no wire form", type="OpNotAllowed")
        return size

    def _label(self, step: Step, frame: Frame, at: dict[int, Labels]) -> bool:
        """Follow the labels through a step; whether it wrote rows into a tensor."""
        labels = NO_LABELS.union(*(at[slot] for slot in step.uses if slot in at))
        if not labels or (step.op is None and step.name != "clone"):
            return False
        result = frame[step.makes[0]] if step.makes else None
        holds = step.op is None or holds_rows(step.op, result)
        for slot in step.makes:
            at[slot] = (labels if holds else NO_LABELS) | at.get(slot, NO_LABELS)
        if step.op is None or not step.op.inplace or not step.first:
            return False
        target = frame[step.first]
        self._store.label_storage(target, labels)
        memory = target.untyped_storage().data_ptr()
        for slot, value in enumerate(frame):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == memory:
                at[slot] = at.get(slot, NO_LABELS) | labels
        return True

    def over(self, command: m.RunOver, dataset: Dataset, numbers: Sequence[float]) -> Over:
        """Begin to run programs over a data set."""
        return Over(command, dataset, numbers, self)


def _run_fast(compiled: Compiled, frame: Frame, *, private: bool) -> None:
    place = 0
    try:
        for run, place in compiled.fast:  # noqa: B007
            run(frame)
    except Exception as error:
        raise _failed(place, compiled.steps[place], error, frame, private=private) from error
    finally:
        _record(True)


def _failed(place: int, step: Step, error: Exception, frame: Frame, *, private: bool) -> StepFailed:
    given = [frame[slot] for slot in step.uses]
    shapes = [describe(each) for each in given if isinstance(each, torch.Tensor)]
    return StepFailed(place + 1, step.name, error, shapes, private=private)


class Over:
    """A run over the batches of a data set, worked off in slices.

    Attributes:
        done: batches that are done.
        stopped: why it ended before the last one: ``"until"``, ``"stop"`` or nothing.
        is_over: whether it has ended.
    """

    def __init__(
        self, command: m.RunOver, dataset: Dataset, numbers: Sequence[float], shelf: Shelf
    ) -> None:
        self.request, self.done, self.stopped, self.is_over = command.request, 0, "", False
        self._command, self._dataset, self._shelf = command, dataset, shelf
        self._numbers = iter(numbers)
        self._generator = unforeseeable()
        self._batches = self._work()
        self._error: Exception | None = None
        row = dataset.row_bytes(command.fields)
        shelf._store.check_room(min(command.batch_size, dataset.rows) * row)

    def advance(self, seconds: float, is_stopped: Callable[[], bool]) -> list[list[float]]:
        """Work for about so long; gives what is to be reported, a list a batch.

        Raises:
            Exception: of a batch; what the batches before gave was reported.
        """
        if self._error is not None:
            raise self._error
        values: list[list[float]] = []
        until = time.monotonic() + seconds
        while not self.is_over:
            if self.done and is_stopped():
                self.stopped, self.is_over = "stop", True
                break
            try:
                shown = next(self._batches, None)
            except Exception as error:
                if not values:
                    raise
                self._error = error
                break
            if shown is None:
                self.is_over = True
                break
            values.append(shown)
            if len(values) >= _REPORTED or time.monotonic() >= until:
                break
        return values

    def _work(self) -> Iterator[list[float]]:
        command, shelf = self._command, self._shelf
        for plan, count, inputs, rows, outs in command.segments:
            kept = shelf._plan(plan)
            row: list[float] = []
            there, labels = shelf._inputs([id for id in inputs if id > 0])
            own = () if self._dataset.open else (self._dataset.name,)
            labels = labels or (NO_LABELS,) * len(there)
            for index in range(count):
                batch = self._next_batch()
                given, marks = list[Any](), list[Labels]()
                rest = iter(zip(there, labels, strict=True))
                for id in inputs:
                    if -id >= len(batch):
                        raise RemoteError(f"a batch has {len(batch)} fields, and no field {-id}")
                    tensor, mark = next(rest) if id > 0 else (batch[-id], frozenset(own))
                    given.append(tensor)
                    marks.append(mark)
                if index < rows:
                    row = list(islice(self._numbers, len(kept.program.numbers)))
                known = tuple(marks) if any(marks) else ()
                results = shelf.perform(kept, given, known, row, outs)
                self.done += 1
                yield [self._number(results, place) for place in command.shown]
                if command.until is not None and self._number(results, command.until):
                    self.stopped, self.is_over = "until", True
                    return

    def _next_batch(self) -> tuple[torch.Tensor, ...]:
        command, rate = self._command, self._command.rate
        epoch, index = divmod(self.done, command.batches)
        seed = None if command.seed is None else command.seed + epoch
        try:
            if rate is not None:
                return self._dataset.sample(
                    rate, command.batch_size, self._generator, command.fields
                )
            return self._dataset.batch(seed, command.batch_size, index, command.fields)
        except LookupError as error:
            raise NotFound(str(error.args[0]), op=f"batch of {command.name!r}") from None

    def _number(self, results: Sequence[tuple[torch.Tensor, Labels]], place: int) -> float:
        if place >= len(results):
            raise RemoteError(f"a plan of {len(results)} results has no result {place}")
        result, labels = results[place]
        check_leaving(labels, "run over a data set")
        if result.numel() != 1 or result.is_complex():
            raise RemoteError(f"a run over a data set reports numbers, not {describe(result)}")
        return float(result.detach())
