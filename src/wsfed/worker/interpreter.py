"""Runs the commands of one session against its store. Knows neither sockets nor threads.

A command that fails never raises: its results are poisoned and a :class:`Reply` tells the client.
A command that needs a poisoned object is passed over and poisons its own results with the same
failure, so that the client hears of the first cause.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils import _pytree as pytree

from wsfed.errors import (
    Cancelled,
    NotFound,
    OpNotAllowed,
    QuotaExceeded,
    RemoteError,
    RemoteProtocolError,
)
from wsfed.ops.arguments import decode
from wsfed.ops.table import OPS, Op, lookup
from wsfed.protocol import limits, modes
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Outgoing
from wsfed.protocol.stream import Incoming
from wsfed.protocol.values import REF
from wsfed.tensors import DTYPE_NAMES, describe, incoming, outgoing
from wsfed.worker.datasets import Dataset
from wsfed.worker.modes import Modes, watched
from wsfed.worker.plans import Over, Programs, Shelf, StepFailed
from wsfed.worker.policy import NO_LABELS, Labels, canned, check_leaving, holds_rows
from wsfed.worker.randomness import SessionRandom
from wsfed.worker.sizes import ResultSizes
from wsfed.worker.store import Entry, Failure, Poisoned, Store, poison_of
from wsfed.worker.strict import Vault

if TYPE_CHECKING:
    from wsfed.worker.secagg import SecureRounds

__all__ = ["Carry", "Interpreter", "Outcome", "Reply"]

_record: Final = torch._C._set_grad_enabled
#: A search tells of this many objects at most.
_MOST_FOUND: Final = 1000
_MOST_STOPPED: Final = 1000
#: Seconds that a run over a data set goes on before it reports.
_SLICE: Final = 0.05
#: Different operations that a session may name; the table has fewer.
_MOST_NAMES: Final = 16_384


@dataclass(frozen=True, slots=True)
class Reply:
    """A message for the client, with the tensor it carries."""

    message: m.Message
    tensor: Outgoing | None = None


@dataclass(frozen=True, slots=True)
class Carry:
    """Tensors to take to another worker; ``tensors`` holds requires_grad, value."""

    request: int
    url: str
    ticket: bytes
    names: Sequence[int]
    tensors: Sequence[tuple[bool, Outgoing]]
    at: tuple[int, int]


@dataclass(slots=True)
class Outcome:
    """What came of a run of commands; ``next`` is the first that has not run."""

    next: int
    replies: list[Reply] = field(default_factory=list)
    carries: list[Carry] = field(default_factory=list)


class Interpreter:
    """The state of a session on the worker.

    Args:
        device: where tensors are kept and computed.
        datasets: the owner's, by name.
        max_bytes: memory that the session's tensors may take.
        max_objects: identifiers that the session may bind.
        programs: recorded programs that the worker has already.
        secure: rounds of secure aggregation, where the owner takes part in some.
        vault: what may leave, where not all does that holds no rows.

    Attributes:
        store: the objects.
    """

    def __init__(
        self,
        device: torch.device,
        datasets: Mapping[str, Dataset],
        *,
        max_bytes: int,
        max_objects: int,
        programs: Programs | None = None,
        secure: SecureRounds | None = None,
        vault: Vault | None = None,
    ) -> None:
        self._secure = secure
        self._vault = vault or Vault(None)
        self.store = Store(max_bytes, max_objects)
        self._device, self._datasets = device, datasets
        self._random = SessionRandom(device)
        self._sizes = ResultSizes()
        self._modes = Modes(device)
        self._shelf = Shelf(self.store, self._sizes, self, device, programs or Programs())
        #: The run over a data set that is being worked on.
        self._over: Over | None = None
        self._stopped: set[int] = set()
        self._names: list[str] = []
        #: The operations of these names, as far as there are some.
        self._ops: list[Op | None] = []
        self._at = (0, 0)

    # --- running ---

    def run(
        self,
        seq: int,
        commands: Sequence[m.Message],
        tensors: Sequence[Incoming],
        start: int,
        budget: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Run the commands of a frame from ``start`` on; the cancelled ones are passed over.

        Stops early when the replies take more than ``budget`` bytes: what is not asked for
        faster than the client reads it is not made.
        """
        outcome = Outcome(start)
        with torch.set_grad_enabled(True):
            for index in range(start, len(commands)):
                self._at = (seq, index)
                command = commands[index]
                if type(command) is m.Execute and not cancelled():
                    self._run_operation(command, outcome)
                else:
                    self._run_one(command, tensors, outcome, cancelled())
                if self._over is not None:  # there is more to do
                    outcome.next = index
                    break
                outcome.next = index + 1
                if outcome.replies and outcome.replies[-1].tensor is not None:
                    budget -= len(outcome.replies[-1].tensor.data)
                    if budget <= 0:
                        break
        return outcome

    def stop(self, request: int) -> None:
        """End a run over a data set with the batch it is at; from any thread."""
        if len(self._stopped) >= _MOST_STOPPED:  # of runs that had ended by themselves
            self._stopped.clear()
        self._stopped.add(request)

    def _run_operation(self, command: m.Execute, outcome: Outcome) -> None:
        """The commonest command."""
        try:
            self._execute(command)
        except Poisoned as poisoned:
            self._fail(command, poisoned.failure, outcome, first=False)
        except Exception as error:
            self._fail_first(command, self._name(command.op), self._given(command), error, outcome)

    def _run_one(
        self,
        command: m.Message,
        tensors: Sequence[Incoming],
        outcome: Outcome,
        cancelled: bool,
    ) -> None:
        name, seen = _SAID.get(type(command), type(command).__name__.lower()), list[Entry]()
        if isinstance(command, m.Execute):
            name = self._name(command.op)
        try:
            if cancelled and not isinstance(command, m.Delete) and self._over is None:
                raise Cancelled("it was cancelled before it ran", op=name)
            if cancelled and self._over is not None:
                self._stopped.add(self._over.request)
            self._dispatch(command, name, seen, tensors, outcome)
        except Poisoned as poisoned:
            self._over = None
            self._fail(command, poisoned.failure, outcome, first=False)
        except StepFailed as failed:
            self._over = None
            self._fail_step(command, failed, outcome)
        except Exception as error:
            self._over = None
            self._fail_first(command, name, seen, error, outcome)

    def _fail_step(self, command: m.Message, failed: StepFailed, outcome: Outcome) -> None:
        """A step of a plan failed."""
        error = failed.error
        if failed.private and not isinstance(error, RemoteError | RemoteProtocolError):
            error = RemoteError(canned(error, failed.name), type=type(error).__name__)
        failure = poison_of(error, failed.name, failed.shapes, self._at, failed.step)
        self._fail(command, failure, outcome, first=True)

    def _fail_first(
        self,
        command: m.Message,
        name: str,
        seen: Sequence[Entry],
        error: Exception,
        outcome: Outcome,
    ) -> None:
        """A command failed by itself; ``seen`` are the objects that it had."""
        private = any(entry.labels for entry in seen)
        if private and not isinstance(error, RemoteError | RemoteProtocolError):
            error = RemoteError(canned(error, name), type=type(error).__name__)
        shapes = [describe(e.value) for e in seen if isinstance(e.value, torch.Tensor)]
        failure = poison_of(error, name, shapes, self._at)
        # Whoever cancels knows it; only what is awaited tells.
        self._fail(command, failure, outcome, first=not isinstance(error, Cancelled))

    def _given(self, command: m.Execute) -> list[Entry]:
        """The objects of an operation's arguments, up to the first that is not there."""
        found: list[Entry] = []

        def look(id: int) -> torch.Tensor:
            found.append(self.store.entry(id))
            return found[-1].value  # type: ignore[return-value]

        with contextlib.suppress(Exception):
            for value in (*command.args, *command.kwargs.values()):
                decode(value, look, self._device)
        return found

    def _fail(self, command: m.Message, failure: Failure, outcome: Outcome, *, first: bool) -> None:
        results = _results(command)
        if first and not isinstance(command, m.Release | m.Get | m.Describe | m.Search):
            self._vault.failed()
        if first and isinstance(command, m.Execute) and not _writes(self._name(command.op)):
            # What would have given its argument itself has not touched it.
            results = [id for id in results if id not in self.store]
        self.store.poison(results, failure)
        if isinstance(command, m.Define):
            self._shelf.poison(command.plan, failure)
        request = getattr(command, "request", 0)
        if request:
            outcome.replies.append(
                Reply(m.RequestFailed(request, failure.seq, failure.index, failure.wire()))
            )
        elif first:
            outcome.replies.append(
                Reply(
                    m.Failed(failure.seq, failure.index, _tells(command, results), failure.wire())
                )
            )

    def _dispatch(
        self,
        command: m.Message,
        name: str,
        seen: list[Entry],
        tensors: Sequence[Incoming],
        outcome: Outcome,
    ) -> None:
        match command:
            case m.Store():
                self._store(command, tensors)
            case m.Delete(ids):
                self.store.delete(ids)
                self._vault.forget(ids)
                self._shelf.forget(ids)
            case m.Define(plan, place):
                self._define(plan, tensors[place])
            case m.Run():
                self._shelf.run(command)
            case m.RunOver():
                self._run_over(command, tensors[command.tensor], outcome)
            case m.Backward():
                self._backward(command, seen)
            case m.Get(request, id):
                outcome.replies.append(self._get(request, id))
            case m.Batch():
                self._batch(command)
            case m.Release():
                self._release(command, seen)
            case m.SecAgg():
                outcome.replies.append(self._secagg(command, tensors[command.tensor], seen))
            case m.Clone(id, copy):
                self._clone(id, copy, seen)
            case m.Flush(request):
                outcome.replies.append(Reply(m.ValueReply(request, None)))
            case m.Seed(seed):
                self._random.seed(seed)
            case m.Tag(id, tags, description):
                self._tag(id, tags, description)
            case m.Move():
                outcome.carries.append(self._carry(command))
            case m.Describe(request, id):
                outcome.replies.append(Reply(m.ValueReply(request, self._describe(id))))
            case m.Search(request, tags):
                outcome.replies.append(Reply(m.ValueReply(request, self._search(tags))))
            case m.OpenDataset(request, wanted):
                found = self._dataset(wanted)
                outcome.replies.append(Reply(m.ValueReply(request, _describe_dataset(found))))
            case _:
                raise AssertionError(f"{type(command).__name__} is not for an interpreter")

    # --- the four of the mission ---

    def _name(self, op: str | int) -> str:
        """Operations are named once a session and numbered from then on."""
        if isinstance(op, str):
            return op
        return self._names[op] if op < len(self._names) else f"#{op}"

    def _op(self, op: str | int) -> Op:
        """The operation; a name is numbered as it comes, whether or not there is one."""
        if type(op) is int and op < len(self._ops) and (known := self._ops[op]) is not None:
            return known
        if isinstance(op, str) and len(self._names) < _MOST_NAMES:
            self._names.append(op)
            self._ops.append(None)
            self._ops[-1] = lookup(op)
        return lookup(self._name(op))

    def _store(self, command: m.Store, tensors: Sequence[Incoming]) -> None:
        received = tensors[command.tensor]
        self.store.check_room(received.nbytes)
        tensor = incoming(received)
        if tensor is None:
            raise QuotaExceeded(f"there is no room for {received.nbytes:,} bytes")
        tensor = tensor.to(self._device)
        if command.requires_grad:
            tensor.requires_grad_()
        self.store.put(command.id, tensor)
        if command.sealed and self._vault.is_strict:
            self.store.check_room(self._vault.nbytes + tensor.nbytes)
            self._vault.seal(command.id, tensor)

    def _execute(self, command: m.Execute) -> None:
        op = self._op(command.op)
        labels = NO_LABELS

        def resolve(id: int) -> torch.Tensor:
            nonlocal labels
            entry = self.store.entry(id)
            if entry.labels:
                labels |= entry.labels
            return entry.value  # type: ignore[return-value]

        args, kwargs = [], {}
        for value in command.args:
            kind = type(value)
            if kind is list and len(value) == 2 and value[0] == REF and type(value[1]) is int:
                args.append(resolve(value[1]))
            elif kind is float or kind is bool or value is None:
                args.append(value)
            else:
                args.append(decode(value, resolve, self._device))
        if command.kwargs:
            for key, value in command.kwargs.items():
                kwargs[key] = decode(value, resolve, self._device)
            op.check(kwargs)
        if size := self._sizes.of(op, args, kwargs):
            self.store.check_room(size)
        result = self._call(op, args, kwargs, command.mode)
        if labels:
            self._bind(command.outs, result, labels if holds_rows(op, result) else NO_LABELS)
            if op.inplace and args and isinstance(args[0], torch.Tensor):
                self.store.label_storage(args[0], labels)
        elif type(result) is torch.Tensor and len(command.outs) == 1:
            _check_form(result)
            self.store.put(command.outs[0], result)
        else:
            self._bind(command.outs, result, NO_LABELS)

    def _call(self, op: Op, args: Sequence[Any], kwargs: dict[str, Any], mode: int) -> Any:
        if mode <= modes.NO_GRAD and not op.random and not self._modes.in_region:
            if not mode:
                return op.call(*args, **kwargs)
            _record(False)  # what torch.no_grad() does, in a third of the time
            try:
                return op.call(*args, **kwargs)
            finally:
                _record(True)
        with self._modes.entered(mode), self._drawing(op), watched(mode, _roots(op, args)):
            return op.call(*args, **kwargs)

    def _drawing(self, op: Op) -> contextlib.AbstractContextManager[None]:
        return self._random.drawing() if op.random else contextlib.nullcontext()

    def _bind(self, outs: Sequence[int], result: Any, labels: Labels) -> None:
        if isinstance(result, torch.Tensor):
            leaves = [result]
        else:
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if len(leaves) != len(outs):
            raise OpNotAllowed(f"it gave {len(leaves)} tensors where {len(outs)} were expected")
        for leaf in leaves:
            _check_form(leaf)
        for id, leaf in zip(outs, leaves, strict=True):
            self.store.put(id, leaf, labels)

    def _backward(self, command: m.Backward, seen: list[Entry]) -> None:
        def look(id: int) -> torch.Tensor:
            entry = self.store.entry(id)
            seen.append(entry)
            return entry.value  # type: ignore[return-value]

        self.backward(command, look)

    def backward(self, command: m.Backward, look: Callable[[int], torch.Tensor]) -> None:
        """Run a backward pass in its modes; ``look`` gives the tensors that it names."""
        roots, gradients = [look(id) for id in command.roots], command.gradients
        with self._modes.entered(command.mode), watched(command.mode, roots):
            torch.autograd.backward(
                roots,
                None if gradients is None else [look(id) if id else None for id in gradients],
                retain_graph=command.retain_graph,
                create_graph=command.create_graph,
                inputs=None if command.inputs is None else [look(id) for id in command.inputs],
            )

    def _get(self, request: int, id: int) -> Reply:
        entry = self.store.entry(id)
        if (sealed := self._vault.sealed(id)) is not None:
            return Reply(m.TensorReply(request, 0, False), outgoing(sealed))
        check_leaving(entry.labels, "get")
        tensor = self._leaving(id)
        leaf = tensor.requires_grad and tensor.is_leaf
        return Reply(m.TensorReply(request, 0, leaf), outgoing(tensor))

    def _leaving(self, id: int) -> torch.Tensor:
        """A tensor that will be copied whole: of a few bytes, a view may have many elements."""
        tensor = self.store.tensor(id)
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            self.store.check_room(tensor.nbytes)
        return tensor

    # --- plans ---

    def _define(self, plan: int, received: Incoming) -> None:
        packed = None if received.data is None else bytes(received.data)
        if packed is None:
            raise QuotaExceeded(f"there is no room for {received.nbytes:,} bytes")
        self._shelf.define(plan, packed)

    def _run_over(self, command: m.RunOver, numbers: Incoming, outcome: Outcome) -> None:
        """Work on a run over a data set for a while; ``_over`` is set until it is done."""
        if (over := self._over) is None:
            rows = incoming(numbers)
            if rows is None:
                raise QuotaExceeded(f"there is no room for {numbers.nbytes:,} bytes")
            dataset = self._dataset(command.name)
            if not dataset.open:
                self._vault.touch(dataset.name)
            if command.until is not None:
                self._vault.check_open("until")
            over = self._over = self._shelf.over(command, dataset, rows.double().tolist())
        values = over.advance(_SLICE, lambda: over.request in self._stopped)
        if self._vault.is_closed:
            values = [[math.nan] * len(each) for each in values]
        if values:
            outcome.replies.append(Reply(m.Progress(over.request, over.done, values)))
        if over.is_over:
            self._over = None
            self._stopped.discard(over.request)
            told = {"done": over.done, "stopped": over.stopped}
            outcome.replies.append(Reply(m.ValueReply(over.request, told)))

    def _release(self, command: m.Release, seen: list[Entry]) -> None:
        if len(command.values) != len(command.outs):
            raise RemoteError("a release names each object once")
        seen += [self.store.entry(id) for id in command.values]
        values = [self.store.tensor(id) for id in command.values]
        self.store.check_room(self._vault.nbytes + 2 * sum(value.nbytes for value in values))
        made = self._vault.release(values, command.given, command.clip, command.noise)
        for id, tensor in zip(command.outs, made, strict=True):
            self.store.put(id, tensor)
            self._vault.seal(id, tensor)

    def call(self, op: Op, args: Sequence[Any], kwargs: dict[str, Any], mode: int) -> Any:
        """Run a step of a plan in its modes (:class:`~wsfed.plans.compiled.Machine`)."""
        return self._call(op, args, kwargs, mode)

    def leave_region(self) -> None:
        """See :class:`~wsfed.plans.compiled.Machine`."""
        with self._modes.entered(0):
            pass

    def _secagg(self, command: m.SecAgg, told: Incoming, seen: list[Entry]) -> Reply:
        """One step of secure aggregation."""
        if self._secure is None:
            raise RemoteError(
                "this worker is no member of a roster: its owner has not started it with one"
            )
        data = b"" if told.data is None else bytes(told.data)
        rows = self._dataset(command.name).rows if command.step == 3 else 0
        seen += [self.store.entry(id) for id in (*command.values, *command.given)]
        values, given = (
            [self.store.tensor(id) for id in ids] for ids in (command.values, command.given)
        )
        made = self._secure.step(command.step, data, command.name, rows, values, given)
        return Reply(m.TensorReply(command.request, 0, False), outgoing(made, lasting=True))

    # --- the others ---

    def _clone(self, id: int, copy: int, seen: list[Entry]) -> None:
        entry = self.store.entry(id)
        seen.append(entry)
        tensor = self.store.tensor(id)
        self.store.check_room(tensor.nbytes)
        made = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        self.store.put(copy, made, entry.labels)

    def _carry(self, command: m.Move) -> Carry:
        tensors = []
        self._vault.check_open("move")
        for id in command.ids:
            entry = self.store.entry(id)
            check_leaving(entry.labels, "move")
            tensor = self._leaving(id)
            tensors.append((tensor.requires_grad, outgoing(tensor)))
        if len(command.names) != len(command.ids):
            raise RemoteError("a move names each object once")
        return Carry(command.request, command.url, command.ticket, command.names, tensors, self._at)

    def _tag(self, id: int, tags: list[str], description: str) -> None:
        entry = self.store.entry(id)
        entry.tags = list(dict.fromkeys([*entry.tags, *tags]))[: limits.MAX_TAGS]
        entry.description = description or entry.description

    def _describe(self, id: int) -> dict[str, Any]:
        tensor = self._vault.sealed(id)
        return _description(
            self.store.tensor(id) if tensor is None else tensor, self.store.entry(id)
        )

    def _search(self, tags: list[str]) -> dict[str, Any]:
        objects = [
            {"id": id, **_description(tensor, entry)}
            for id, entry, tensor in self.store.tagged(tags)
            if not self._vault.is_closed
        ]
        named = [name for name in self._datasets if set(tags) <= {name, f"#{name}"}]
        return {"objects": objects[:_MOST_FOUND], "datasets": named}

    def _dataset(self, name: str) -> Dataset:
        found = self._datasets.get(name)
        if found is None:
            known = ", ".join(sorted(map(repr, self._datasets))) or "none"
            raise NotFound(f"there is no data set {name[:100]!r} on this worker; it has {known}")
        return found

    def _batch(self, command: m.Batch) -> None:
        dataset = self._dataset(command.name)
        try:
            row = dataset.row_bytes(command.fields)
            self.store.check_room(min(command.batch_size, dataset.rows) * row)
            tensors = dataset.batch(command.seed, command.batch_size, command.index, command.fields)
        except LookupError as error:
            raise NotFound(str(error.args[0]), op=f"batch of {command.name!r}") from None
        labels = NO_LABELS if dataset.open else frozenset({dataset.name})
        if labels:
            self._vault.touch(dataset.name)
        self._bind(command.outs, tuple(tensors), labels)


def _writes(name: str) -> bool:
    op = OPS.get(name)
    return op is not None and op.inplace


def _check_form(result: torch.Tensor) -> None:
    if result.layout is not torch.strided or result.dtype not in DTYPE_NAMES:
        raise OpNotAllowed(f"its result ({result.dtype}, {result.layout}) has no wire form")


def _roots(op: Op, args: Sequence[Any]) -> Sequence[torch.Tensor]:
    """Where the backward pass begins, for what makes one."""
    return args[0] if op.name == "torch.autograd.grad" else ()


#: What a client calls a command, where that is not the command's own name.
_SAID: Final[Mapping[type[m.Message], str]] = {
    m.Define: "plan",
    m.OpenDataset: "dataset",
    m.Run: "plan",
    m.RunOver: "plan",
}


def _tells(command: m.Message, results: Sequence[int]) -> bool:
    """Whether awaiting what the command was to make tells of its failure."""
    return bool(results) or isinstance(command, m.Define)


def _results(command: m.Message) -> list[int]:
    """The identifiers that a command would have bound."""
    match command:
        case m.Execute() | m.Batch() | m.Run():
            return command.outs
        case m.RunOver():
            return [id for *_, outs in command.segments for id in outs if id]
        case m.Store():
            return [command.id]
        case m.Release():
            return command.outs
        case m.Clone():
            return [command.copy]
    return []


def _description(tensor: torch.Tensor, entry: Entry) -> dict[str, Any]:
    return {
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "requires_grad": tensor.requires_grad,
        "is_leaf": tensor.is_leaf,
        "tags": entry.tags,
        "description": entry.description,
    }


def _describe_dataset(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "rows": dataset.rows,
        "open": dataset.open,
        "fields": [
            [name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)]
            for name, tensor in dataset.fields.items()
        ],
    }
