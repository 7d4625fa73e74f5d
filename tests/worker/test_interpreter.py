"""Commands against a store: what they bind, what they answer, and what a failure leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wsfed
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.modes import INFERENCE, NO_GRAD
from wsfed.protocol.stream import Incoming
from wsfed.tensors import DTYPES, outgoing
from wsfed.worker.interpreter import Interpreter, Outcome
from wsfed.worker.store import Poisoned

ROWS = torch.arange(12.0).reshape(6, 2)
BUDGET = 2**30


class Machine:
    """An interpreter that is told one frame after the other."""

    def __init__(self, *, max_bytes: int = 2**30, max_objects: int = 1000) -> None:
        datasets = {
            name: wsfed.Dataset(name, {"x": ROWS, "y": torch.arange(6)}, open=name == "public")
            for name in ("secret", "public")
        }
        self.interpreter = Interpreter(
            torch.device("cpu"), datasets, max_bytes=max_bytes, max_objects=max_objects
        )
        self.seq = 0

    def run(self, *commands: m.Message, tensors: Any = (), **options: Any) -> Outcome:
        self.seq += 1
        wired = [received(each) for each in tensors]
        options = {"start": 0, "budget": BUDGET, **options}
        return self.interpreter.run(self.seq, commands, wired, **options)

    def store(self, id: int, tensor: torch.Tensor, *, requires_grad: bool = False) -> Outcome:
        return self.run(m.Store(id, 0, requires_grad, False), tensors=[tensor])

    def tensor(self, id: int) -> torch.Tensor:
        return self.interpreter.store.tensor(id)


def received(tensor: torch.Tensor) -> Incoming:
    out = outgoing(tensor)
    return Incoming(out.dtype, out.shape, len(out.data), out.data)


def value(outcome: Outcome, place: int = 0) -> torch.Tensor:
    reply = outcome.replies[place]
    assert isinstance(reply.message, m.TensorReply), reply.message
    assert reply.tensor is not None
    dtype = DTYPES[reply.tensor.dtype]
    return torch.frombuffer(bytearray(reply.tensor.data), dtype=dtype).view(reply.tensor.shape)


def execute(op: str | int, out: int | list[int], *args: Any, mode: int = 0) -> m.Execute:
    return m.Execute(op, [out] if isinstance(out, int) else out, list(args), {}, mode)


@pytest.fixture
def machine() -> Machine:
    return Machine()


# --- the four of the mission ---------------------------------------------------------------------


def test_what_is_stored_is_got_back(machine: Machine) -> None:
    machine.store(1, ROWS)
    outcome = machine.run(m.Get(9, 1))
    assert torch.equal(value(outcome), ROWS)
    assert outcome.replies[0].message == m.TensorReply(9, 0, False)


def test_an_operation_binds_its_results_in_order(machine: Machine) -> None:
    machine.store(1, ROWS)
    machine.run(execute("torch.Tensor.max", [5, 6], [0, 1], 0))
    assert torch.equal(machine.tensor(5), torch.tensor([10.0, 11.0]))
    assert torch.equal(machine.tensor(6), torch.tensor([5, 5]))


def test_an_operation_has_a_number_from_its_first_use_on(machine: Machine) -> None:
    machine.store(1, torch.zeros(2))
    machine.run(execute("torch.Tensor.add", 2, [0, 1], 1), execute(0, 3, [0, 2], 1))
    assert torch.equal(machine.tensor(3), torch.full((2,), 2.0))
    (reply,) = machine.run(execute(7, 4, [0, 1])).replies
    assert isinstance(reply.message, m.Failed)
    assert reply.message.failure[0] == "OpNotAllowed"


def test_an_operation_in_place_keeps_its_object(machine: Machine) -> None:
    machine.store(1, torch.zeros(2))
    before = machine.tensor(1)
    machine.run(execute("torch.Tensor.add_", 1, [0, 1], 1))
    assert machine.tensor(1) is before
    assert torch.equal(before, torch.ones(2))


def test_backward_leaves_the_gradient_with_its_leaf(machine: Machine) -> None:
    machine.store(1, torch.ones(3), requires_grad=True)
    machine.run(
        execute("torch.Tensor.mul", 2, [0, 1], 3),
        execute("torch.Tensor.sum", 3, [0, 2]),
        m.Backward([3], None, None, False, None, 0),
    )
    assert torch.equal(machine.tensor(1).grad, torch.full((3,), 3.0))  # type: ignore[arg-type]
    (reply,) = machine.run(m.Backward([3], None, None, False, None, 0)).replies
    assert isinstance(reply.message, m.Failed)
    assert reply.message.bound is False
    assert "second time" in reply.message.failure[2]


def test_backward_may_be_given_gradients_and_inputs(machine: Machine) -> None:
    for id in (1, 2):
        machine.store(id, torch.ones(2), requires_grad=True)
    machine.store(3, torch.tensor([5.0, 7.0]))
    machine.run(
        execute("torch.Tensor.mul", 4, [0, 1], [0, 2]),
        m.Backward([4], [3], None, False, [1], 0),
    )
    assert torch.equal(machine.tensor(1).grad, torch.tensor([5.0, 7.0]))  # type: ignore[arg-type]
    assert machine.tensor(2).grad is None


@pytest.mark.parametrize(("mode", "grad"), [(0, True), (NO_GRAD, False), (INFERENCE, False)])
def test_the_mode_of_a_command_is_its_own(machine: Machine, mode: int, grad: bool) -> None:
    machine.store(1, torch.ones(2), requires_grad=True)
    with torch.no_grad():
        machine.run(
            execute("torch.Tensor.mul", 2, [0, 1], 3, mode=mode),
            execute("torch.Tensor.mul", 3, [0, 1], 3),
        )
    assert machine.tensor(2).requires_grad is grad
    assert machine.tensor(2).is_inference() is (mode == INFERENCE)
    assert machine.tensor(3).requires_grad, "the mode of the one before is over"


# --- failures ------------------------------------------------------------------------------------


def test_a_failure_poisons_its_results_and_what_depends_on_them(machine: Machine) -> None:
    machine.store(1, torch.ones(2, 3))
    outcome = machine.run(
        execute("torch.Tensor.matmul", 2, [0, 1], [0, 1]),
        execute("torch.Tensor.add", 3, [0, 2], 1),
        m.Get(8, 3),
        m.Get(9, 1),
    )
    failed, told, good = (reply.message for reply in outcome.replies)
    assert isinstance(failed, m.Failed) and isinstance(told, m.RequestFailed)
    assert (failed.seq, failed.index, failed.bound) == (2, 0, True)
    assert (told.seq, told.index) == (2, 0), "the first cause"
    assert told.failure == failed.failure
    assert failed.failure[3:] == ["torch.Tensor.matmul", ["float32[2, 3]"] * 2, 0]
    assert isinstance(good, m.TensorReply)


def test_an_object_that_is_bound_again_is_well_again(machine: Machine) -> None:
    machine.run(execute("torch.Tensor.abs", 2, [0, 99]))
    machine.store(2, torch.ones(1))
    assert torch.equal(value(machine.run(m.Get(9, 2))), torch.ones(1))


@pytest.mark.parametrize(
    "command",
    [
        m.Get(9, 5),
        m.Describe(9, 5),
        m.Move(9, [5], [1], "ws://elsewhere", b"t"),
        m.OpenDataset(9, "nothing"),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_request_for_what_is_not_there_is_answered_not_found(
    machine: Machine, command: m.Message
) -> None:
    (reply,) = machine.run(command).replies
    assert isinstance(reply.message, m.RequestFailed)
    assert (reply.message.request, reply.message.failure[0]) == (9, "NotFound")


@pytest.mark.parametrize(
    "command",
    [
        m.Clone(5, 6),
        m.Tag(5, ["#x"], ""),
        m.Backward([5], None, None, False, None, 0),
        m.Batch("nothing", ["x"], [6], None, 2, 0),
        m.Batch("public", ["z"], [6], None, 2, 0),
        m.Batch("public", ["x"], [6], None, 2, 9),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_command_on_what_is_not_there_fails_as_not_found(
    machine: Machine, command: m.Message
) -> None:
    (reply,) = machine.run(command).replies
    assert isinstance(reply.message, m.Failed)
    assert reply.message.failure[0] == "NotFound"


def test_results_of_another_number_are_refused(machine: Machine) -> None:
    machine.store(1, ROWS)
    for outs in ([], [2, 3]):
        (reply,) = machine.run(execute("torch.Tensor.abs", outs, [0, 1])).replies
        assert isinstance(reply.message, m.Failed)
        assert "it gave 1 tensors" in reply.message.failure[2]


def test_a_long_message_is_cut(machine: Machine) -> None:
    (reply,) = machine.run(execute("x" * 5000, 2)).replies
    assert isinstance(reply.message, m.Failed)
    kind, _, message, op, *_ = reply.message.failure
    assert kind == "OpNotAllowed"
    assert len(message) <= limits.MAX_TEXT and len(op) <= 256


# --- running -------------------------------------------------------------------------------------


def test_cancelled_commands_are_passed_over_except_deletes(machine: Machine) -> None:
    machine.store(1, torch.ones(1))
    machine.store(2, torch.ones(1))
    outcome = machine.run(
        execute("torch.Tensor.add_", 1, [0, 1], 1),
        execute("torch.Tensor.abs", 3, [0, 2]),
        m.Get(9, 3),
        m.Delete([2]),
        cancelled=lambda: True,
    )
    (reply,) = outcome.replies
    assert isinstance(reply.message, m.RequestFailed)
    assert reply.message.failure[0] == "Cancelled"
    assert 2 not in machine.interpreter.store


def test_a_run_stops_when_its_replies_fill_the_budget_and_goes_on_later(machine: Machine) -> None:
    machine.store(1, torch.ones(100))
    commands = [m.Get(number, 1) for number in (1, 2, 3)]
    first = machine.run(*commands, budget=500)
    assert (first.next, len(first.replies)) == (2, 2)
    rest = machine.run(*commands, start=first.next, budget=500)
    assert (rest.next, len(rest.replies)) == (3, 1)


@pytest.mark.parametrize(
    "command",
    [
        execute("torch.Tensor.repeat", 9, [0, 1], 10),
        execute("torch.Tensor.outer", 9, [0, 1], [0, 1]),
        m.Clone(1, 9),
        m.Batch("public", ["x"], [9], None, 6, 0),
    ],
    ids=["repeat", "outer", "clone", "batch"],
)
def test_a_command_that_would_take_too_much_memory_does_not_run(command: m.Message) -> None:
    small = Machine(max_bytes=440)
    small.store(1, torch.ones(100))
    kept = small.tensor(1)
    failed, told = (reply.message for reply in small.run(command, m.Get(8, 9)).replies)
    assert isinstance(failed, m.Failed) and isinstance(told, m.RequestFailed)
    assert failed.failure[0] == told.failure[0] == "QuotaExceeded"
    assert small.tensor(1) is kept
    small.run(m.Delete([1, 9]))
    small.store(2, torch.ones(100))
    assert torch.equal(small.tensor(2), torch.ones(100))


def test_objects_are_bounded_in_number() -> None:
    small = Machine(max_objects=3)
    outcomes = [small.store(id, torch.ones(1)) for id in (1, 2, 3, 4)]
    assert [len(each.replies) for each in outcomes] == [0, 0, 0, 1]
    message = outcomes[3].replies[0].message
    assert isinstance(message, m.Failed)
    assert message.failure[0] == "QuotaExceeded"


def test_a_tensor_for_which_there_was_no_room_poisons_its_name(machine: Machine) -> None:
    came = [Incoming("float32", (10**9,), 4 * 10**9, None)]
    outcome = machine.interpreter.run(
        1, [m.Store(1, 0, False, False), m.Get(2, 1)], came, 0, BUDGET
    )
    failed, told = (reply.message for reply in outcome.replies)
    assert isinstance(failed, m.Failed) and isinstance(told, m.RequestFailed)
    assert told.failure[0] == "QuotaExceeded"


def test_random_numbers_are_those_of_the_session_and_not_of_the_process(machine: Machine) -> None:
    other = Machine()
    machine.store(1, torch.full((50,), 0.5))
    other.store(1, torch.full((50,), 0.5))
    torch.manual_seed(5)
    expected = torch.bernoulli(torch.full((50,), 0.5))
    state = torch.get_rng_state()
    for each in (machine, other):
        each.run(m.Seed(5), execute("torch.bernoulli", 2, [0, 1]))
        assert torch.equal(each.tensor(2), expected)
    assert torch.equal(torch.get_rng_state(), state)


# --- the others ----------------------------------------------------------------------------------


def test_a_description_tells_everything_but_values(machine: Machine) -> None:
    machine.store(1, ROWS, requires_grad=True)
    machine.run(m.Tag(1, ["#a", "#b", "#a"], "rows"), m.Tag(1, ["#c"], ""))
    (reply,) = machine.run(m.Describe(9, 1)).replies
    assert reply.message == m.ValueReply(
        9,
        {
            "dtype": "float32",
            "shape": [6, 2],
            "stride": [2, 1],
            "requires_grad": True,
            "is_leaf": True,
            "tags": ["#a", "#b", "#c"],
            "description": "rows",
        },
    )


def test_a_search_finds_objects_with_all_tags_and_data_sets_by_name(machine: Machine) -> None:
    for id, tags in ((1, ["#a"]), (2, ["#a", "#b"]), (3, [])):
        machine.store(id, torch.ones(id))
        machine.run(m.Tag(id, tags, ""))

    def found(*tags: str) -> tuple[list[int], list[str]]:
        (reply,) = machine.run(m.Search(9, list(tags))).replies
        assert isinstance(reply.message, m.ValueReply)
        told = reply.message.value
        return [each["id"] for each in told["objects"]], told["datasets"]

    assert found("#a") == ([1, 2], [])
    assert found("#a", "#b") == ([2], [])
    assert found("#secret") == ([], ["secret"])
    assert found("public") == ([], ["public"])
    assert found() == ([1, 2], ["secret", "public"])


def test_tags_are_bounded(machine: Machine) -> None:
    machine.store(1, torch.ones(1))
    machine.run(*(m.Tag(1, [f"#{number}"], "") for number in range(100)))
    (reply,) = machine.run(m.Describe(9, 1)).replies
    assert isinstance(reply.message, m.ValueReply)
    assert len(reply.message.value["tags"]) == limits.MAX_TAGS


def test_a_clone_is_an_independent_leaf(machine: Machine) -> None:
    machine.store(1, torch.zeros(2), requires_grad=True)
    machine.run(m.Clone(1, 2), execute("torch.Tensor.add_", 1, [0, 1], 1, mode=NO_GRAD))
    assert torch.equal(machine.tensor(2), torch.zeros(2))
    assert machine.tensor(2).is_leaf and machine.tensor(2).requires_grad


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (execute("torch.Tensor.__getitem__", 7, [0, 5], 0), True),
        (execute("torch.Tensor.mul", 7, [0, 5], 2), True),
        (execute("torch.Tensor.copy_", 6, [0, 6], [0, 5]), True),
        (m.Clone(5, 7), True),
        (execute("torch.Tensor.sum", 7, [0, 5]), False),
        (execute("torch.Tensor.mean", 7, [0, 5]), False),
    ],
    ids=["a row", "twice the rows", "written into another", "a copy", "a sum", "a mean"],
)
def test_rows_of_a_private_data_set_are_held_back(
    machine: Machine, make: m.Message, held: bool
) -> None:
    machine.store(6, torch.zeros(6, 2))
    machine.run(m.Batch("secret", ["x"], [5], None, 6, 0), make)
    result = 6 if getattr(make, "outs", None) == [6] else 7
    for request in (m.Get(9, result), m.Move(9, [result], [1], "ws://elsewhere", b"t")):
        outcome = machine.run(request)
        refused = [
            reply.message.failure[0]
            for reply in outcome.replies
            if isinstance(reply.message, m.RequestFailed)
        ]
        assert refused == (["GetNotPermitted"] if held else [])
        assert bool(outcome.carries) is (not held and isinstance(request, m.Move))


def test_an_error_on_private_rows_says_nothing_of_them(machine: Machine) -> None:
    machine.run(m.Batch("secret", ["y"], [5], None, 6, 0))
    machine.store(1, torch.zeros(2))
    (reply,) = machine.run(execute("torch.Tensor.index_select", 7, [0, 1], 0, [0, 5])).replies
    assert isinstance(reply.message, m.Failed)
    kind, type, message, _, shapes, _ = reply.message.failure
    assert (kind, type) == ("RemoteError", "IndexError")
    assert "its message stays on the worker" in message
    assert shapes == ["float32[2]", "int64[6]"]


def test_open_rows_may_be_got_and_a_batch_is_a_copy(machine: Machine) -> None:
    machine.run(
        m.Batch("public", ["y", "x"], [5, 6], None, 4, 1),
        execute("torch.Tensor.zero_", 6, [0, 6]),
    )
    assert torch.equal(value(machine.run(m.Get(9, 5))), torch.tensor([4, 5]))
    machine.run(m.Batch("public", ["x"], [7], None, 4, 1))
    assert torch.equal(value(machine.run(m.Get(9, 7))), ROWS[4:])


def test_a_failure_leaves_an_argument_that_it_would_have_given_back(machine: Machine) -> None:
    machine.store(1, ROWS)
    (failed,) = machine.run(
        m.Execute("torch.Tensor.to", [1], [[0, 1], [7, "cuda:0"]], {}, 0)
    ).replies
    assert isinstance(failed.message, m.Failed)
    assert not failed.message.bound
    assert torch.equal(machine.tensor(1), ROWS)


def test_a_write_that_fails_leaves_nothing_to_be_read(machine: Machine) -> None:
    machine.store(1, ROWS)
    machine.run(execute("torch.Tensor.add_", 1, [0, 1], [0, 9]))
    with pytest.raises(Poisoned):
        machine.tensor(1)
