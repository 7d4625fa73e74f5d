"""A recorded program: the commands of a session, with slots where a session has identifiers.

It is data: a worker checks it once, when it arrives, and runs it as often as it is asked to. Slots
are numbered from 1: first the inputs (arguments and what a function captured), then the numbers
that may be others at each run (a learning rate, Adam's bias correction), then the constants, then
what the steps make.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NoReturn

import msgpack
import torch

from wsfed.errors import OpNotAllowed, RemoteProtocolError
from wsfed.protocol import limits, modes
from wsfed.protocol import messages as m
from wsfed.protocol import values as v
from wsfed.tensors import DTYPE_NAMES, DTYPES, snapshot

__all__ = ["Constant", "Program", "Spec", "check_command", "load", "made", "refs", "renamed"]

_VERSION: Final = 1
_EXECUTE, _BACKWARD = m.Execute.code, m.Backward.code
_CLONE, _DELETE = m.Clone.code, m.Delete.code
_STEPS: Final = frozenset({_EXECUTE, _BACKWARD, _CLONE, _DELETE})


@dataclass(frozen=True, slots=True)
class Spec:
    """What an input has to be."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor may be given."""
        return DTYPE_NAMES.get(tensor.dtype) == self.dtype and tuple(tensor.shape) == self.shape


@dataclass(frozen=True, slots=True)
class Constant:
    """A small local tensor that the function met, as it was then."""

    spec: Spec
    data: bytes

    @staticmethod
    def of(tensor: torch.Tensor) -> Constant:
        """A copy of a tensor's values."""
        copy = snapshot(tensor)
        spec = Spec(DTYPE_NAMES[copy.dtype], tuple(copy.shape))
        if copy.numel() == 0:
            return Constant(spec, b"")
        raw = (torch.view_as_real(copy) if copy.is_complex() else copy).reshape(-1)
        array: Any = raw.view(torch.uint8).numpy()
        return Constant(spec, array.tobytes())

    def tensor(self) -> torch.Tensor:
        """A tensor of its own memory."""
        dtype = DTYPES[self.spec.dtype]
        if not self.data:
            return torch.empty(self.spec.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.spec.shape).clone()


@dataclass(frozen=True)
class Program:
    """What a plan does on a worker.

    Attributes:
        inputs: what has to be given, in order.
        numbers: the numbers as they were recorded.
        constants: local tensors that the function met.
        steps: commands in wire form (execute, backward, clone, delete), operations by name.
        results: slots that a run gives.
    """

    inputs: tuple[Spec, ...]
    numbers: tuple[float, ...]
    constants: tuple[Constant, ...]
    steps: tuple[list[Any], ...]
    results: tuple[int, ...]

    @cached_property
    def packed(self) -> bytes:
        """The program as it travels and as it is kept in files."""
        names: dict[str, int] = {}
        steps = []
        for step in self.steps:
            if step[0] == _EXECUTE:
                step = [_EXECUTE, names.setdefault(step[1], len(names)), *step[2:]]
            steps.append(step)
        packed: bytes = msgpack.packb(
            [
                _VERSION,
                [[spec.dtype, list(spec.shape)] for spec in self.inputs],
                list(self.numbers),
                [[each.spec.dtype, list(each.spec.shape), each.data] for each in self.constants],
                list(names),
                steps,
                list(self.results),
            ]
        )
        return packed

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what travels, in hexadecimal: equal programs have equal hashes."""
        return hashlib.sha256(self.packed).hexdigest()

    @property
    def first_made(self) -> int:
        """The first slot that a step makes."""
        return 1 + len(self.inputs) + len(self.numbers) + len(self.constants)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, names: Mapping[int, str] | None = None) -> Iterator[str]:
        """The program for people, a step a line.

        Args:
            names: of some slots.
        """
        names = {**self._names(), **(names or {})}
        for place, spec in enumerate(self.inputs, 1):
            yield f"  {names[place]}: {spec}"
        for place, each in enumerate(self.constants, 1 + len(self.inputs) + len(self.numbers)):
            yield f"  {names[place]}: {each.spec} = constant"
        for step in self.steps:
            if step[0] != _DELETE:
                yield f"  {_spoken(step, names)}"
        results = ", ".join(names.get(slot, f"t{slot}") for slot in self.results)
        yield f"  return {results or 'nothing'}"

    def _names(self) -> dict[int, str]:
        kinds = [f"in{place}" for place in range(len(self.inputs))]
        kinds += [f"{number:.6g}" for number in self.numbers]
        kinds += [f"const{place}" for place in range(len(self.constants))]
        return dict(enumerate(kinds, 1))


def _spoken(step: Sequence[Any], names: Mapping[int, str]) -> str:
    def say(slot: int | None) -> str:
        return "None" if slot is None else names.get(slot, f"t{slot}")

    if step[0] == _CLONE:
        return f"{say(step[2])} = clone({say(step[1])})"
    if step[0] == _BACKWARD:
        _, roots, gradients, _, _, inputs, _ = step
        given = f", gradients=[{', '.join(map(say, gradients))}]" if gradients else ""
        only = f", inputs=[{', '.join(map(say, inputs))}]" if inputs else ""
        return f"backward({', '.join(map(say, roots))}{given}{only})"
    _, name, outs, args, kwargs, mode = step
    said = [_say_value(arg, say) for arg in args]
    said += [f"{word}={_say_value(arg, say)}" for word, arg in kwargs.items()]
    word = name.removeprefix("torch.").removeprefix("nn.functional.")
    given = f"{', '.join(map(say, outs))} = " if outs else ""
    marks = [word for bit, word in _MODES if mode & bit]
    note = f"  # {', '.join(marks)}" if marks else ""
    return f"{given}{word}({', '.join(said)}){note}"


_MODES: Final = (
    (modes.NO_GRAD, "no_grad"),
    (modes.INFERENCE, "inference_mode"),
    (modes.AUTOCAST_BFLOAT16, "autocast bfloat16"),
    (modes.AUTOCAST_FLOAT16, "autocast float16"),
    (modes.ANOMALY, "anomaly"),
)


def _say_value(value: Any, say: Callable[[int], str]) -> str:
    if type(value) is not list:
        return f"{value:.6g}" if type(value) is float else repr(value)
    tag, items = value[0], value[1:]
    if tag == v.REF:
        return say(items[0])
    if tag in (v.DTYPE, v.LAYOUT, v.MEMORY_FORMAT, v.DEVICE):
        return str(items[0])
    if tag == v.ELLIPSIS:
        return "..."
    if tag == v.SLICE:
        parts = ["" if part is None else _say_value(part, say) for part in items]
        return ":".join(parts if parts[2] else parts[:2])
    if tag == v.COMPLEX:
        return str(complex(*items))
    if tag == v.DICT:
        pairs = zip(items[::2], items[1::2], strict=True)
        return f"{{{', '.join(f'{key!r}: {_say_value(item, say)}' for key, item in pairs)}}}"
    inner = ", ".join(_say_value(item, say) for item in items)
    return f"[{inner}]" if tag == v.LIST else f"({inner})"


# --- what a command names -------------------------------------------------------------------------


def renamed(
    command: Sequence[Any],
    rename: Callable[[int], int],
    number: Callable[[tuple[Any, ...], float], Any] | None = None,
    bind: Callable[[int], int] | None = None,
) -> list[Any]:
    """The command with other identifiers; those of its arguments first, in order.

    Args:
        command: in wire form.
        rename: gives the new identifier for an old one.
        number: gives what stands for a fractional number, by its place and value.
        bind: gives the new identifier for one that is bound, if that is another matter.
    """
    code, bind = command[0], bind or rename
    if code == _EXECUTE:
        _, op, outs, args, kwargs, mode = command
        new_args = [_renamed(arg, rename, number, (op, place)) for place, arg in enumerate(args)]
        new_kwargs = {
            word: _renamed(arg, rename, number, (op, word)) for word, arg in kwargs.items()
        }
        return [code, op, list(map(bind, outs)), new_args, new_kwargs, mode]
    if code == _BACKWARD:
        _, roots, gradients, retain_graph, create_graph, inputs, mode = command
        return [
            code,
            list(map(rename, roots)),
            None if gradients is None else [None if g is None else rename(g) for g in gradients],
            retain_graph,
            create_graph,
            None if inputs is None else list(map(rename, inputs)),
            mode,
        ]
    if code == _CLONE:
        return [code, rename(command[1]), bind(command[2])]
    return [code, list(map(rename, command[1]))]


def _renamed(
    value: Any,
    rename: Callable[[int], int],
    number: Callable[[tuple[Any, ...], float], Any] | None,
    at: tuple[Any, ...],
) -> Any:
    kind = type(value)
    if kind is float and number is not None:
        return number(at, value)
    if kind is not list:
        return value
    if value[0] == v.REF:
        return [v.REF, rename(value[1])]
    if value[0] in _PLAIN:
        return value
    return [
        value[0],
        *(_renamed(item, rename, number, (*at, place)) for place, item in enumerate(value[1:])),
    ]


#: Tags that no identifier is under.
_PLAIN: Final = frozenset({v.ELLIPSIS, v.DTYPE, v.DEVICE, v.COMPLEX, v.LAYOUT, v.MEMORY_FORMAT})


def refs(command: Sequence[Any]) -> list[int]:
    """The identifiers that a command uses, without its results."""
    found: list[int] = []

    def look(id: int) -> int:
        found.append(id)
        return id

    code = command[0]
    if code == _EXECUTE:
        renamed([code, command[1], [], *command[3:]], look)
    elif code == _CLONE:
        look(command[1])
    else:
        renamed(command, look)
    return found


def made(command: Sequence[Any]) -> list[int]:
    """The identifiers that a command binds."""
    if command[0] == _EXECUTE:
        return list(command[2])
    return [command[2]] if command[0] == _CLONE else []


# --- reading and checking -------------------------------------------------------------------------


def load(packed: bytes) -> Program:
    """Read a program and check that it is one.

    What is checked: that it is well formed and within its limits, and that each step uses only
    what is there by then. Whether its operations are known is checked when it is compiled.

    Raises:
        RemoteProtocolError: it is no program.
        OpNotAllowed: it is of another version.
    """
    if len(packed) > limits.MAX_PLAN_BYTES:
        _malformed(f"it has more than {limits.MAX_PLAN_BYTES:,} bytes")
    try:
        raw = msgpack.unpackb(packed, strict_map_key=True, use_list=True)
    except Exception as error:  # msgpack and the text decoder raise many kinds
        _malformed(f"it cannot be read ({type(error).__name__})")
    if type(raw) is not list or not raw or type(raw[0]) is not int:
        _malformed("it is no list that begins with a version")
    if raw[0] != _VERSION:
        raise OpNotAllowed(f"a plan of version {raw[0]}; version {_VERSION} is what runs here")
    if len(raw) != 7 or not all(type(part) is list for part in raw[1:]):
        _malformed("it has six lists after the version")
    inputs, numbers, constants, names, steps, results = raw[1:]
    if not all(type(number) is float for number in numbers):
        _malformed("its numbers are fractional ones")
    if not all(type(name) is str and len(name) <= 256 for name in names):
        _malformed("operations are named by text")
    if (
        len(inputs) + len(numbers) + len(constants) > limits.MAX_IDS
        or len(results) > limits.MAX_IDS
    ):
        _malformed("it has too many inputs or results")
    program = Program(
        tuple(_spec(each) for each in inputs),
        tuple(numbers),
        tuple(_constant(each) for each in constants),
        tuple(_step(each, names) for each in steps),
        tuple(results),
    )
    _check_slots(program)
    return program


def _malformed(why: str) -> NoReturn:
    raise RemoteProtocolError("malformed", f"this is no plan: {why}")


def _spec(raw: Any) -> Spec:
    if type(raw) is not list or len(raw) != 2 or type(raw[0]) is not str or raw[0] not in DTYPES:
        _malformed("an input is a dtype and a shape")
    if type(raw[1]) is not list:
        _malformed("an input is a dtype and a shape")
    if len(raw[1]) > limits.MAX_DIMENSIONS:
        _malformed("a shape has too many dimensions")
    if not all(type(size) is int and 0 <= size <= limits.MAX_ID for size in raw[1]):
        _malformed("a shape is made of sizes")
    return Spec(raw[0], tuple(raw[1]))


def _constant(raw: Any) -> Constant:
    if type(raw) is not list or len(raw) != 3 or type(raw[2]) is not bytes:
        _malformed("a constant is a dtype, a shape and bytes")
    spec = _spec(raw[:2])
    if math.prod(spec.shape) * DTYPES[spec.dtype].itemsize != len(raw[2]):
        _malformed("a constant has as many bytes as its shape says")
    return Constant(spec, raw[2])


def check_command(raw: Any) -> list[Any]:
    """The command, if it is one that a program may have.

    Raises:
        RemoteProtocolError: it is not.
    """
    if type(raw) is not list or not raw or type(raw[0]) is not int or raw[0] not in _STEPS:
        _malformed("a step is an execute, backward, clone or delete")
    m.parse(raw, (m.COMMANDS,))
    return list(raw)


def _step(raw: Any, names: Sequence[str]) -> list[Any]:
    step = check_command(raw)
    if step[0] != _EXECUTE:
        return step
    if type(raw[1]) is not int or raw[1] >= len(names):
        _malformed("an operation is a number in the list of names")
    return [_EXECUTE, names[raw[1]], *raw[2:]]


def _check_slots(program: Program) -> None:
    """Whether whatever a step or a result names is there by then."""
    there = set(range(1, program.first_made))
    most = program.first_made + limits.MAX_PLAN_SLOTS
    for place, step in enumerate(program.steps):
        try:
            used = refs(step)
        except (TypeError, IndexError, RecursionError):
            _malformed(f"step {place} has an argument that is none")
        if not there.issuperset(used):
            _malformed(f"step {place} uses what is not there")
        if step[0] == _DELETE:
            there.difference_update(used)
        for slot in made(step):
            if slot >= most:
                _malformed(f"it uses more than {limits.MAX_PLAN_SLOTS:,} slots")
            there.add(slot)
    if not all(type(slot) is int and slot in there for slot in program.results):
        _malformed("a result is not there at the end")
