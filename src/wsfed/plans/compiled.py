"""A program made ready to run: a list of closures over one list of slots.

Everything that does not change from run to run is done once: operations are looked up, constant
arguments decoded, places of the others found. A step is then one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch.utils import _pytree as pytree

from wsfed.errors import OpNotAllowed
from wsfed.ops.arguments import decode
from wsfed.ops.table import Op, lookup
from wsfed.plans.passes import Fused, fuse
from wsfed.plans.program import Program, made, refs
from wsfed.protocol import messages as m
from wsfed.protocol import modes
from wsfed.protocol import values as v

__all__ = ["Compiled", "Frame", "Machine", "Step"]

#: The slots of one run; the first item is the :class:`Machine`.
Frame: TypeAlias = list[Any]
_Run: TypeAlias = Callable[[Frame], Any]

_record: Final = torch._C._set_grad_enabled
_Tensor: Final = torch.Tensor


class Machine(Protocol):
    """What runs the steps that need more than a call: modes and random numbers of a session."""

    def call(self, op: Op, args: Sequence[Any], kwargs: dict[str, Any], mode: int) -> Any:
        """Run an operation in its modes."""

    def backward(self, command: m.Backward, look: Callable[[int], torch.Tensor]) -> None:
        """Run a backward pass in its modes."""

    def leave_region(self) -> None:
        """End a region of autocast, if one lasts."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step, for what has to be known of it besides running it.

    Attributes:
        run: does it.
        op: the operation, ``None`` for a backward pass, a copy and a delete.
        name: for errors.
        uses: slots of the tensors that it is given.
        makes: slots that it binds.
        first: the slot of its first argument, 0 if that is none.
        mode: that it runs in.
        arguments: makes what an operation is given.
        bind: puts what it gives into slots.
    """

    run: _Run
    op: Op | None
    name: str
    uses: tuple[int, ...]
    makes: tuple[int, ...]
    first: int = 0
    mode: int = 0
    arguments: Callable[[Frame], tuple[list[Any], dict[str, Any]]] | None = None
    bind: Callable[[Frame, Any], None] | None = None


class Compiled:
    """A program that can be run.

    Args:
        program: checked.
        device: where tensors are and constants go.

    Attributes:
        program: what it was made of.
        steps: in order, for a run that looks closely.
        fast: the same with neighbours fused and modes switched only where they change.

    Raises:
        OpNotAllowed: an operation is unknown or refused here.
        RemoteProtocolError: an argument is malformed.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program = program
        self._constants = [constant.tensor().to(device) for constant in program.constants]
        top = max((slot for step in program.steps for slot in made(step)), default=0)
        self._literals: list[Any] = []
        self._first_literal = max(top + 1, program.first_made)
        self._device = device
        self.steps = tuple(self._step(step) for step in program.steps)
        self.fast = tuple(self._fast(program.steps))

    def frame(self, machine: Machine, inputs: Sequence[Any], numbers: Sequence[float]) -> Frame:
        """The slots at the beginning of a run."""
        constants = [constant.clone() for constant in self._constants]
        frame: Frame = [machine, *inputs, *numbers, *constants]
        frame += [None] * (self._first_literal - len(frame))
        frame += self._literals
        return frame

    # --- making steps ---

    def _step(self, command: list[Any]) -> Step:
        uses, makes = tuple(refs(command)), tuple(made(command))
        match command[0]:
            case m.Execute.code:
                return self._execute(command, uses, makes)
            case m.Backward.code:
                return Step(_backward(m.Backward(*command[1:])), None, "backward", uses, ())
            case m.Clone.code:
                return Step(_clone(*command[1:]), None, "clone", uses, makes)
        return Step(_free(tuple(command[1])), None, "delete", uses, ())

    def _execute(self, command: list[Any], uses: tuple[int, ...], makes: tuple[int, ...]) -> Step:
        _, name, outs, args, kwargs, mode = command
        op = lookup(name)
        self._check(op, args, kwargs)
        places, builders = self._places(args), [self._builder(arg) for arg in args]
        words = {word: self._builder(arg) for word, arg in kwargs.items()}

        def arguments(frame: Frame) -> tuple[list[Any], dict[str, Any]]:
            made_args = [build(frame) for build in builders]
            return made_args, {word: build(frame) for word, build in words.items()}

        bind = _binder(tuple(outs))
        if _is_plain(op, mode):
            run = _call(op.call, places, builders, words, outs, bind)
        else:

            def run(frame: Frame) -> None:
                given, named = arguments(frame)
                bind(frame, frame[0].call(op, given, named, mode))

        first = args[0][1] if args and type(args[0]) is list and args[0][0] == v.REF else 0
        return Step(run, op, name, uses, makes, first, mode, arguments, bind)

    def _check(self, op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Whether the arguments are some, before there are values for them."""
        stand_in = torch.empty(())
        for arg in args:
            decode(arg, lambda _: stand_in, self._device)
        op.check(
            {word: decode(arg, lambda _: stand_in, self._device) for word, arg in kwargs.items()}
        )

    def _places(self, args: Sequence[Any]) -> list[int] | None:
        """The slots of the arguments, if each of them is in one."""
        places = []
        for arg in args:
            if type(arg) is list and arg[0] == v.REF:
                places.append(arg[1])
            elif _holds_ref(arg):
                return None
            else:
                places.append(self._literal(arg))
        return places

    def _literal(self, wire: Any) -> int:
        self._literals.append(decode(wire, _no_reference, self._device))
        return self._first_literal + len(self._literals) - 1

    def _builder(self, wire: Any) -> _Run:
        """How an argument is made of the slots."""
        if type(wire) is list and wire[0] == v.REF:
            return itemgetter(wire[1])
        if not _holds_ref(wire):
            value = decode(wire, _no_reference, self._device)
            return lambda frame: value
        if wire[0] in (v.LIST, v.TUPLE) and len(wire) > 2 and all(map(_is_ref, wire[1:])):
            get: Any = itemgetter(*(item[1] for item in wire[1:]))
            return get if wire[0] == v.TUPLE else lambda frame: list(get(frame))
        device = self._device
        return lambda frame: decode(wire, frame.__getitem__, device)

    # --- running fast ---

    def _fast(self, commands: Sequence[list[Any]]) -> Iterator[tuple[_Run, int]]:
        """What to do, each with the place of its command; modes change only where they have to."""
        records, in_region, place = True, False, 0
        for command, place in self._fused(commands):
            if isinstance(command, Fused):
                run, mode, is_call, is_plain = _foreach(command), command.mode, True, True
            else:
                step = self.steps[place]
                run, mode, is_call = step.run, step.mode, step.op is not None
                is_plain = step.op is not None and _is_plain(step.op, mode)
            if is_call and is_plain and in_region:
                yield _leave_region, place
                in_region = False
            wants = not (is_plain and mode & modes.NO_GRAD)
            if wants is not records and _minds_recording(command):
                yield (_start_recording if wants else _stop_recording), place
                records = wants
            in_region = in_region or bool(mode & modes.AUTOCAST)
            yield run, place
        if not records:
            yield _start_recording, place

    def _fused(self, commands: Sequence[list[Any]]) -> Iterable[tuple[list[Any] | Fused, int]]:
        if self._device.type != "cpu":  # a list is worked off at once there, with other roundings
            return ((command, place) for place, command in enumerate(commands))
        first = 1 + len(self.program.inputs)
        return fuse(commands, range(first, first + len(self.program.numbers)).__contains__)


def _minds_recording(command: list[Any] | Fused) -> bool:
    """Whether it matters to a command if gradients are recorded."""
    return isinstance(command, Fused) or command[0] != m.Delete.code


def _is_plain(op: Op, mode: int) -> bool:
    """Whether calling the function is all there is to do, but for recording gradients or not."""
    return mode <= modes.NO_GRAD and not op.random


def _start_recording(frame: Frame) -> None:
    _record(True)


def _stop_recording(frame: Frame) -> None:
    _record(False)


def _leave_region(frame: Frame) -> None:
    frame[0].leave_region()


def _no_reference(id: int) -> Any:
    raise AssertionError("a constant refers to no slot")


def _is_ref(wire: Any) -> bool:
    return type(wire) is list and wire[0] == v.REF


def _holds_ref(wire: Any) -> bool:
    return type(wire) is list and (wire[0] == v.REF or any(map(_holds_ref, wire[1:])))


# --- closures -------------------------------------------------------------------------------------


def _call(
    call: Callable[..., Any],
    places: list[int] | None,
    builders: list[_Run],
    words: dict[str, _Run],
    outs: Sequence[int],
    bind: Callable[[Frame, Any], None],
) -> _Run:
    if places is None or not places:

        def built(frame: Frame) -> None:
            args = [build(frame) for build in builders]
            bind(frame, call(*args, **{word: build(frame) for word, build in words.items()}))

        return built
    if len(places) == 1:
        (place,) = places
        get: Any = lambda frame: (frame[place],)  # noqa: E731
    else:
        get = itemgetter(*places)
    if words:

        def named(frame: Frame) -> None:
            bind(frame, call(*get(frame), **{word: build(frame) for word, build in words.items()}))

        return named
    if len(outs) != 1:

        def several(frame: Frame) -> None:
            bind(frame, call(*get(frame)))

        return several
    (out,) = outs

    def one(frame: Frame) -> None:
        result = call(*get(frame))
        if type(result) is _Tensor:
            frame[out] = result
        else:
            bind(frame, result)

    return one


def _binder(outs: tuple[int, ...]) -> Callable[[Frame, Any], None]:
    def bind(frame: Frame, result: Any) -> None:
        if isinstance(result, _Tensor):
            leaves: list[Any] = [result]
        else:
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, _Tensor)]
        if len(leaves) != len(outs):
            raise OpNotAllowed(f"it gave {len(leaves)} tensors where {len(outs)} were expected")
        for out, leaf in zip(outs, leaves, strict=True):
            frame[out] = leaf

    return bind


def _backward(command: m.Backward) -> _Run:
    return lambda frame: frame[0].backward(command, frame.__getitem__)


def _clone(source: int, target: int) -> _Run:
    def run(frame: Frame) -> None:
        tensor = frame[source]
        frame[target] = tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return run


def _free(slots: tuple[int, ...]) -> _Run:
    if len(slots) == 1:
        (only,) = slots

        def free_one(frame: Frame) -> None:
            frame[only] = None

        return free_one

    def free(frame: Frame) -> None:
        for slot in slots:
            frame[slot] = None

    return free


def _foreach(fused: Fused) -> _Run:
    """One call of torch's for a list."""
    call = getattr(torch, fused.word)
    gets: list[Any] = [_getter(column) for column in fused.columns]
    if not fused.words:
        return lambda frame: call(*[get(frame) for get in gets])
    ((word, slot),) = fused.words.items()
    return lambda frame: call(*[get(frame) for get in gets], **{word: frame[slot]})


def _getter(column: list[int] | int) -> Any:
    return itemgetter(column) if isinstance(column, int) else itemgetter(*column)
