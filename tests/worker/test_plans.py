"""The programs of a session: run, refused, bounded, and never a way around the rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.plans.test_program import EXECUTE, PROGRAM, op
from tests.worker.test_interpreter import Machine
from wsfed.plans.program import Program, Spec
from wsfed.protocol import limits
from wsfed.protocol import messages as m


def define(machine: Machine, program: Program | bytes, plan: int = 100) -> Any:
    packed = program if isinstance(program, bytes) else program.packed
    data = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    return machine.run(m.Define(plan, 0), tensors=[data])


def failure_of(outcome: Any) -> list[Any]:
    (reply,) = outcome.replies
    failure: list[Any] = reply.message.failure
    return failure


@pytest.fixture
def machine() -> Machine:
    made = Machine()
    made.store(1, torch.tensor([1.0, 2.0]), requires_grad=True)
    made.store(2, torch.tensor(7.0))
    return made


def test_a_program_runs_and_binds_its_results(machine: Machine) -> None:
    assert not define(machine, PROGRAM).replies
    for numbers, expected in (([0.5], [1.5, 7.0]), ([3.0], [4.0, 7.0])):
        assert not machine.run(m.Run(100, [1, 2], numbers, [10, 11])).replies
        assert machine.tensor(10).tolist() == expected
        assert machine.tensor(11).item() == sum(expected)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (m.Run(101, [1, 2], [0.5], [10, 11]), "no plan 101"),
        (m.Run(100, [1], [0.5], [10, 11]), "takes 2 inputs and 1 numbers and gives 2 results"),
        (m.Run(100, [1, 2], [], [10, 11]), "takes 2 inputs and 1 numbers"),
        (m.Run(100, [1, 2], [0.5], [10]), "gives 2 results, not 2, 1 and 1"),
        (m.Run(100, [2, 2], [0.5], [10, 11]), "input 0 has to be float32[2], not float32[]"),
        (m.Run(100, [1, 77], [0.5], [10, 11]), "77"),
    ],
)
def test_a_run_that_does_not_fit_is_told(machine: Machine, command: m.Run, text: str) -> None:
    define(machine, PROGRAM)
    assert text in failure_of(machine.run(command))[2]
    assert not machine.run(m.Run(100, [1, 2], [0.5], [20, 21])).replies


def test_what_is_no_program_fails_at_its_runs(machine: Machine) -> None:
    assert failure_of(define(machine, b"nonsense"))[0] == "RemoteError"
    outcome = machine.run(m.Run(100, [1, 2], [0.5], [10, 11]), m.Get(1, 10))
    assert "no plan" in failure_of(outcome)[2]
    unknown = Program((), (), (), ([EXECUTE, "torch.of_tomorrow", [1], [], {}, 0],), (1,))
    assert failure_of(define(machine, unknown, 101))[:2] == ["OpNotAllowed", "OpNotAllowed"]


def test_a_failing_step_is_named(machine: Machine) -> None:
    program = Program(
        (Spec("float32", (2,)),), (), (), (op("Tensor.t", 2, [1]), op("linalg.inv", 3, [2])), (3,)
    )
    define(machine, program)
    for _ in range(2):
        failure = failure_of(machine.run(m.Run(100, [1], [], [10])))
        assert failure[3:] == ["torch.linalg.inv", ["float32[2]"], 2]


def test_programs_are_counted_and_forgotten(machine: Machine) -> None:
    for plan in range(1000, 1000 + limits.MAX_PLANS):
        assert not define(machine, PROGRAM, plan).replies
    assert failure_of(define(machine, PROGRAM, 5000))[0] == "QuotaExceeded"
    machine.run(m.Delete([1000]))
    assert not define(machine, PROGRAM, 5001).replies


def test_what_a_program_makes_counts_before_it_is_made() -> None:
    machine = Machine(max_bytes=40 * 2**20)
    machine.store(1, torch.ones(2**20))
    grows = Program(
        (Spec("float32", (2**20,)),),
        (),
        (),
        (op("Tensor.repeat", 2, [1], 20), op("Tensor.sum", 3, [2])),
        (3,),
    )
    define(machine, grows)
    for _ in range(2):
        assert failure_of(machine.run(m.Run(100, [1], [], [10])))[0] == "QuotaExceeded"


def test_a_run_over_a_data_set_reports_and_answers(machine: Machine) -> None:
    program = Program((Spec("float32", (2, 2)),), (0.5,), (), (op("Tensor.sum", 3, [1]),), (3,))
    define(machine, program)
    over = m.RunOver(1, "secret", ["x"], None, 2, 3, [[100, 6, [0], 1, [0]]], 0, [0], None, None)
    outcome = machine.run(over, tensors=[torch.tensor([0.5], dtype=torch.float64)])
    progress, answer = (reply.message for reply in outcome.replies)
    assert isinstance(progress, m.Progress) and isinstance(answer, m.ValueReply)
    assert (progress.done, progress.values) == (6, [[6.0], [22.0], [38.0]] * 2)
    assert answer.value == {"done": 6, "stopped": ""}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "nowhere"}, "no data set 'nowhere'"),
        ({"fields": ["z"]}, "no field 'z'"),
        ({"fields": []}, "a batch has 0 fields"),
        ({"segments": [[100, 6, [-1], 1, [0]]]}, "no field 1"),
        ({"segments": [[101, 6, [0], 1, [0]]]}, "no plan 101"),
        ({"segments": [[100, 9, [0], 1, [0]]], "batches": 9}, "no batch 3"),
        ({"shown": [4]}, "no result 4"),
        ({"until": 4}, "no result 4"),
    ],
)
def test_a_run_over_a_data_set_that_cannot_be_is_told(
    machine: Machine, changes: dict[str, Any], text: str
) -> None:
    define(machine, Program((Spec("float32", (2, 2)),), (), (), (op("Tensor.sum", 3, [1]),), (3,)))
    given = {
        "request": 1, "name": "secret", "fields": ["x"], "seed": None, "batch_size": 2,
        "batches": 3, "segments": [[100, 3, [0], 1, [0]]], "tensor": 0, "shown": [0],
        "until": None, "rate": None,
    }  # fmt: skip
    outcome = machine.run(
        m.RunOver(**{**given, **changes}), tensors=[torch.zeros(0, dtype=torch.float64)]
    )
    while not outcome.replies or not isinstance(outcome.replies[-1].message, m.RequestFailed):
        outcome = machine.run(
            m.RunOver(**{**given, **changes}), tensors=[torch.zeros(0, dtype=torch.float64)]
        )
    assert text in outcome.replies[-1].message.failure[2]
    assert machine.run(m.Flush(2)).replies


def test_rows_are_followed_through_a_program(machine: Machine) -> None:
    machine.run(m.Batch("secret", ["x"], [5], None, 2, 0))
    machine.store(6, torch.zeros(2, 2))
    program = Program(
        (Spec("float32", (2, 2)), Spec("float32", (2, 2))),
        (),
        (),
        (
            op("Tensor.mul", 3, [1], 2.0),
            op("Tensor.sum", 4, [3]),
            op("Tensor.view", 5, [2], -1),
            op("Tensor.copy_", 2, [2], [3]),
        ),
        (3, 4, 5),
    )
    define(machine, program)
    for first in (10, 20):
        machine.run(m.Run(100, [5, 6], [], [first, first + 1, first + 2]))
        kinds = [
            type(machine.run(m.Get(1, id)).replies[0].message)
            for id in (first, first + 1, first + 2, 6)
        ]
        assert kinds == [m.RequestFailed, m.TensorReply, m.RequestFailed, m.RequestFailed]


def test_a_failure_among_private_rows_says_nothing_of_them(machine: Machine) -> None:
    machine.run(m.Batch("secret", ["y"], [5], None, 6, 0))
    program = Program(
        (Spec("float32", (2,)), Spec("int64", (6,))),
        (),
        (),
        (op("Tensor.index_select", 3, [1], 0, [2]),),
        (3,),
    )
    define(machine, program)
    for _ in range(2):
        failure = failure_of(machine.run(m.Run(100, [1, 5], [], [10])))
        assert "private data" in failure[2] and failure[1] == "IndexError"
