"""Random programs, here, on a worker and as a plan: everything is equal, or all raise the same.

5 to 60 operations with views, writes in place, slices and backward passes, drawn by hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wsfed
from tests.pointers.oracle import bits
from wsfed import sync

#: What a step does, given two tensors of the program and a whole number.
STEPS: Final[dict[str, Callable[[Any, Any, int], Any]]] = {
    "add": lambda a, b, n: a + b,
    "subtract a number": lambda a, b, n: a - n / 4,
    "multiply": lambda a, b, n: a * b,
    "tanh": lambda a, b, n: torch.tanh(a),
    "relu": lambda a, b, n: torch.relu(a),
    "where": lambda a, b, n: torch.where(a > 0, a, b),
    "transpose": lambda a, b, n: a.t(),
    "slice": lambda a, b, n: a[: 1 + n % 3],
    "slice with a step": lambda a, b, n: a[:, :: 1 + n % 2],
    "pick a row": lambda a, b, n: a[n % a.shape[0]][None],
    "reshape": lambda a, b, n: a.reshape(-1, a.shape[0]),
    "flatten and view": lambda a, b, n: a.contiguous().view(1, -1),
    "expand": lambda a, b, n: a[:1].expand(3, -1),
    "chunk": lambda a, b, n: a.chunk(2)[0],
    "cat": lambda a, b, n: torch.cat([a, b]),
    "product": lambda a, b, n: a @ b.t(),
    "softmax": lambda a, b, n: torch.softmax(a, 1),
    "mean": lambda a, b, n: a.mean(0, keepdim=True),
    "several results": lambda a, b, n: a.max(1, keepdim=True).values,
    "clone": lambda a, b, n: a.clone(),
    "detach": lambda a, b, n: a.detach(),
    "leaf": lambda a, b, n: a.detach().clone().requires_grad_(),
    "write a number": lambda a, b, n: a.mul_(1 + n / 8),
    "write a tensor": lambda a, b, n: a.add_(b),
    "assign to a slice": lambda a, b, n: a.__setitem__(slice(None, 1 + n % 2), float(n)),
    "assign a tensor": lambda a, b, n: a.__setitem__(0, b[0]),
    "write without gradients": lambda a, b, n: _without(lambda: a.sub_(b.detach())),
    "compute without gradients": lambda a, b, n: _without(lambda: a * b),
    "go backward": lambda a, b, n: (a * a).sum().backward(),
    "take a gradient": lambda a, b, n: torch.autograd.grad((a * b).sum(), a)[0],
    "gradient": lambda a, b, n: a.grad,
    "forget the gradient": lambda a, b, n: setattr(a, "grad", None),
}


def _without(work: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return work()


@dataclass(frozen=True)
class Step:
    """An operation, and which tensors and number it gets."""

    name: str
    first: int
    second: int
    number: int


STEP = st.builds(
    Step,
    st.sampled_from(sorted(STEPS)),
    *(st.integers(0, 63), st.integers(0, 63), st.integers(0, 7)),
)
PROGRAM = st.lists(STEP, min_size=5, max_size=60)


@dataclass
class Ran:
    """What a program made, up to the step that failed."""

    tensors: list[Any]
    error: str = ""


def run(program: list[Step], send: Callable[[torch.Tensor], Any]) -> Ran:
    """Run a program; a step that torch refuses ends it."""
    ran = Ran(started(send))
    go_on(ran, program)
    return ran


def started(send: Callable[[torch.Tensor], Any]) -> list[Any]:
    """The two tensors that a program begins with."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator) for _ in range(2)]
    return [send(each.requires_grad_(place == 0)) for place, each in enumerate(start)]


def go_on(ran: Ran, program: list[Step]) -> None:
    """Run a program on what there is."""
    try:
        for step in program:
            do(step, ran.tensors)
    except REFUSALS as error:
        ran.error = message_of(error)


REFUSALS: Final = (RuntimeError, ValueError, IndexError, TypeError, wsfed.WsfedError)


def do(step: Step, tensors: list[Any]) -> None:
    a, b = tensors[step.first % len(tensors)], tensors[step.second % len(tensors)]
    made = STEPS[step.name](a, b, step.number)
    if isinstance(made, torch.Tensor) and made.ndim == 2:
        tensors.append(made)


def as_plan(program: list[Step]) -> wsfed.Plan[..., Any]:
    """A plan of the program; it gives all tensors."""

    def function(*start: Any) -> list[Any]:
        tensors = list(start)
        for step in program:
            do(step, tensors)
        return tensors

    return wsfed.plan(function)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """What sending does, without a worker."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def message_of(error: Exception) -> str:
    """torch's own text, without what differs from call to call (versions, stack traces)."""
    text = error.message if isinstance(error, wsfed.RemoteError) else str(error)
    if any(part in text for part in _MEMORY):
        return _SHARED
    return text.split(" is at version ")[0].splitlines()[0][:80]


#: torch has several texts for what may not be written to because of whose memory it is.
_MEMORY: Final = (
    *("is a view and", "leaf Variable that requires grad", "A view was created"),
    "unsupported operation: ",
)
_SHARED: Final = "this memory may not be written to"


def state_of(tensor: Any) -> tuple[Any, ...]:
    """Everything that can be told of a tensor, or why nothing can."""
    try:
        return _state_of(tensor)
    except (RuntimeError, wsfed.RemoteError) as error:
        return (message_of(error),)


def _state_of(tensor: Any) -> tuple[Any, ...]:
    kinds = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad, tensor.is_leaf)
    gradient = tensor.grad if tensor.is_leaf else None
    return (*kinds, bits(value_of(tensor)), None if gradient is None else bits(value_of(gradient)))


def value_of(tensor: Any) -> torch.Tensor:
    return (tensor.get() if isinstance(tensor, wsfed.Pointer) else tensor).detach()


@pytest.fixture(scope="module")
def bob() -> Iterator[sync.VirtualWorker]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with sync.VirtualWorker("bob") as worker:
        yield worker
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(program=PROGRAM)
def test_programs_do_the_same_here_and_there(program: list[Step], bob: sync.VirtualWorker) -> None:
    local = run(program, here)
    remote = run(program, bob.send)
    assert_alike(remote, local, unseen(bob))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(program=PROGRAM, after=st.lists(STEP, max_size=8))
def test_programs_do_the_same_as_plans(
    program: list[Step], after: list[Step], bob: sync.VirtualWorker
) -> None:
    plan = as_plan(program)
    for _ in range(3):  # recorded, run again, and gone on from
        local = run(program, here)
        remote = Ran([])
        try:
            remote.tensors = plan(*started(bob.send))
        except REFUSALS as error:
            remote.error = message_of(error)
        assert_alike(remote, local, unseen(bob))
    if not local.error:
        go_on(local, after)
        go_on(remote, after)
        assert_alike(remote, local, unseen(bob))


def unseen(bob: sync.VirtualWorker) -> list[str]:
    """What has failed on the worker and was not told yet."""
    failures = []
    while True:
        try:
            bob.flush()
        except wsfed.RemoteError as error:
            failures.append(message_of(error))
        else:
            return failures


def assert_alike(remote: Ran, local: Ran, failures: list[str]) -> None:
    if local.error:
        raised = [remote.error, *failures]
        # Of two mistakes in one call, torch may tell of the memory, and the pointer of the other.
        assert local.error in raised or (local.error == _SHARED and any(raised))
        return
    assert not remote.error and not failures, (remote.error, failures)
    assert len(remote.tensors) == len(local.tensors)
    for place, (one, other) in enumerate(zip(remote.tensors, local.tensors, strict=True)):
        assert state_of(one) == state_of(other), place
