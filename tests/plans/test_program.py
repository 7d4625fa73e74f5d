"""Programs: they come back from their bytes, and nothing that is none is taken for one."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsfed.errors import OpNotAllowed, RemoteProtocolError
from wsfed.plans.compiled import Compiled
from wsfed.plans.passes import Fused, free_early, fuse, side_by_side, without_dead_code
from wsfed.plans.program import Constant, Program, Spec, load, made, refs
from wsfed.protocol import limits
from wsfed.protocol import messages as m

EXECUTE = m.Execute.code


def op(name: str, out: int, *args: Any, mode: int = 0, **kwargs: Any) -> list[Any]:
    """A command; tensors are slots in a list."""
    wire = [[0, *arg] if isinstance(arg, list) else arg for arg in args]
    words = {word: [0, *arg] if isinstance(arg, list) else arg for word, arg in kwargs.items()}
    return [EXECUTE, f"torch.{name}", [out], wire, words, mode]


MASK = torch.tensor([True, False])
PROGRAM = Program(
    (Spec("float32", (2,)), Spec("float32", ())),
    (0.5,),
    (Constant.of(MASK),),
    (
        op("add", 5, [1], [3]),
        op("where", 6, [4], [5], [2]),
        [m.Clone.code, 6, 7],
        op("Tensor.sum", 8, [7]),
        [m.Backward.code, [8], None, None, False, None, 0],
        [m.Delete.code, [5, 7]],
    ),
    (6, 8),
)


def test_a_program_comes_back_from_its_bytes() -> None:
    again = load(PROGRAM.packed)
    assert again == PROGRAM and again.hash == PROGRAM.hash
    assert torch.equal(again.constants[0].tensor(), MASK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_constant_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    back = Constant.of(tensor).tensor()
    assert back.dtype == dtype and torch.equal(back, tensor)


def test_a_program_is_readable() -> None:
    lines = str(PROGRAM).splitlines()
    assert "  t5 = add(in0, 0.5)" in lines
    assert "  t6 = where(const0, t5, in1)" in lines
    assert "  backward(t8)" in lines
    assert lines[-1] == "  return t6, t8"


def changed(place: int, value: Any) -> bytes:
    raw = msgpack.unpackb(PROGRAM.packed)
    raw[place] = value
    return msgpack.packb(raw)


WRONG = {
    "no msgpack": b"\xc1",
    "no list": msgpack.packb({"a": 1}),
    "too short": msgpack.packb([1, []]),
    "an input without a shape": changed(1, [["float32"]]),
    "an unknown dtype": changed(1, [["float99", [2]]]),
    "a negative size": changed(1, [["float32", [-2]]]),
    "a number that is text": changed(2, ["0.5"]),
    "a constant of other size": changed(3, [["bool", [3], b"\x01"]]),
    "a name that is a number": changed(4, [7]),
    "a step that is no list": changed(5, [7]),
    "a command that is not for plans": changed(5, [[m.Get.code, 1, 1]]),
    "an operation without a name": changed(5, [[EXECUTE, 99, [5], [], {}, 0]]),
    "a slot that is not there": changed(5, [[EXECUTE, 0, [5], [[0, 77]], {}, 0]]),
    "a slot that was freed": changed(5, [[m.Delete.code, [1]], [EXECUTE, 0, [5], [[0, 1]], {}, 0]]),
    "a slot far away": changed(5, [[EXECUTE, 0, [2**40], [[0, 1]], {}, 0]]),
    "a reference that is none": changed(5, [[EXECUTE, 0, [5], [[0]], {}, 0]]),
    "a deep argument": changed(5, [[EXECUTE, 0, [5], [[1, [1] * 3]], {}, "0"]]),
    "a result that is not there": changed(6, [5]),
    "a result that is text": changed(6, ["6"]),
    "too many bytes": b"\x00" * (limits.MAX_PLAN_BYTES + 1),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_program_is_refused(kind: str) -> None:
    with pytest.raises(RemoteProtocolError):
        load(WRONG[kind])


def test_another_version_is_named() -> None:
    with pytest.raises(OpNotAllowed, match="version 2"):
        load(changed(0, 2))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_program_or_refused(data: bytes) -> None:
    try:
        load(data)
    except (RemoteProtocolError, OpNotAllowed):
        pass


@given(st.integers(0, len(PROGRAM.packed) - 1), st.integers(0, 255))
def test_a_changed_byte_compiles_or_is_refused(place: int, byte: int) -> None:
    data = bytearray(PROGRAM.packed)
    data[place] = byte
    try:
        Compiled(load(bytes(data)), torch.device("cpu"))
    except (RemoteProtocolError, OpNotAllowed):
        pass


def test_an_operation_that_is_unknown_or_refused_is_named() -> None:
    for name in ("torch.load", "torch.of_tomorrow"):
        program = Program((), (), (), ([EXECUTE, name, [1], [], {}, 0],), (1,))
        with pytest.raises(OpNotAllowed) as caught:
            Compiled(load(program.packed), torch.device("cpu"))
        assert caught.value.op == name


# --- passes ---------------------------------------------------------------------------------------


def test_what_nobody_uses_is_left_out() -> None:
    steps = [
        op("Tensor.mul", 2, [1], 2.0),
        op("Tensor.add", 3, [2], 1.0),
        op("Tensor.t", 4, [1]),
        op("rand_like", 5, [1]),
        op("Tensor.add_", 1, [1], 1.0),
        op("nn.functional.relu", 6, [1], True),
        op("nn.functional.relu", 7, [1], inplace=True),
    ]
    kept = without_dead_code(steps, [3])
    assert kept == [steps[0], steps[1], *steps[3:]]


def test_a_slot_is_forgotten_behind_its_last_use() -> None:
    steps = [op("Tensor.mul", 2, [1], 2.0), op("Tensor.mul", 3, [2], [2]), op("Tensor.t", 4, [3])]
    freed = free_early(steps, [4], 2)
    assert freed == [steps[0], steps[1], [m.Delete.code, [2]], steps[2], [m.Delete.code, [3]]]


def test_the_updates_of_parameters_stand_side_by_side_and_are_fused() -> None:
    def is_number(slot: int) -> bool:
        return slot == 9

    steps = [
        command
        for p, buffer, g in ((1, 3, 5), (2, 4, 6))
        for command in (
            op("Tensor.mul_", buffer, [buffer], [9], mode=1),
            op("Tensor.add_", buffer, [buffer], [g], alpha=[9], mode=1),
            op("Tensor.add_", p, [p], [buffer], alpha=[9], mode=1),
        )
    ]
    ordered = side_by_side(steps, is_number)
    assert sorted(map(repr, ordered)) == sorted(map(repr, steps))
    assert [command for command, _ in fuse(ordered, is_number)] == [
        Fused("_foreach_mul_", [[3, 4], 9], {}, 1),
        Fused("_foreach_add_", [[3, 4], [5, 6]], {"alpha": 9}, 1),
        Fused("_foreach_add_", [[1, 2], [3, 4]], {"alpha": 9}, 1),
    ]


def test_refs_and_made_are_what_a_command_uses_and_binds() -> None:
    command = [EXECUTE, "torch.cat", [7], [[1, [0, 3], [0, 4]]], {"dim": 0}, 0]
    assert (refs(command), made(command)) == ([3, 4], [7])
    assert refs([m.Backward.code, [1, 2], [3, None], None, False, [4], 0]) == [1, 2, 3, 4]
    assert (refs([m.Clone.code, 1, 2]), made([m.Clone.code, 1, 2])) == ([1], [2])
