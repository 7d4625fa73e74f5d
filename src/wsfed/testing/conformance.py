"""Whether a worker behaves as every worker has to: one suite for all kinds of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from wsfed.client.worker import Worker
from wsfed.errors import ConnectionLost, NotCollocated, NotFound, OpNotAllowed, RemoteError
from wsfed.pointers import modules
from wsfed.pointers.pointer import Pointer, make_pointer
from wsfed.protocol import messages as m

__all__ = ["CHECKS", "Connect", "check_worker"]

#: Gives a fresh session on the worker that is tested, each time it is called.
Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Worker]]


async def check_worker(connect: Connect) -> list[str]:
    """Check that a worker behaves as every worker has to.

    Args:
        connect: gives a fresh session on the worker, as ``lambda: wsfed.connect(url)`` does.

    Returns:
        The names of the checks that passed: all of them.

    Raises:
        AssertionError: the first check that failed, by name.
    """
    for check in CHECKS:
        try:
            await check(connect)
        except Exception as error:
            name = check.__name__.lstrip("_").replace("_", " ")
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return [check.__name__.lstrip("_").replace("_", " ") for check in CHECKS]


async def _a_tensor_comes_back_as_it_was(connect: Connect) -> None:
    tensors = [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.zeros(0, 3),
        torch.zeros(1).expand(4),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ]
    async with connect() as worker:
        for tensor in tensors:
            back = await worker.send(tensor).get()
            assert back.dtype == tensor.dtype
            assert back.shape == tensor.shape
            assert torch.equal(back.view(-1).isnan(), tensor.reshape(-1).isnan())
            assert torch.equal(back.nan_to_num(), tensor.nan_to_num())


async def _a_large_tensor_travels_in_chunks_both_ways(connect: Connect) -> None:
    tensor = torch.arange(600_000, dtype=torch.int32)
    async with connect() as worker:
        assert torch.equal(await worker.send(tensor).get(), tensor)


async def _what_is_sent_is_the_value_of_that_moment(connect: Connect) -> None:
    tensor = torch.zeros(3)
    async with connect() as worker:
        pointer = worker.send(tensor)
        tensor.add_(1)
        assert torch.equal(await pointer.get(), torch.zeros(3))


async def _operations_run_in_order_and_equal_torch(connect: Connect) -> None:
    x, y = torch.randn(4, 5), torch.randn(5, 3)
    async with connect() as worker:
        a, b = worker.send(x), worker.send(y)
        a.mul_(2)
        values, places = (a @ b).max(1)
        expected = (x * 2 @ y).max(1)
        assert torch.equal(await values.get(), expected.values)
        assert torch.equal(await places.get(), expected.indices)
        assert torch.equal(await a.get(), x * 2)


async def _training_equals_torch_bit_for_bit(connect: Connect) -> None:
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    async with connect() as worker:
        there = modules.copy(here)
        losses = await _train(worker.send(there), worker.send(x), worker.send(y))
        assert losses == await _train(here, x, y)
        await modules.get(there)
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


async def _train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value = loss.detach()
        losses.append(float(await value if isinstance(value, Pointer) else value))
    return losses


async def _random_numbers_follow_the_seed_of_the_session(connect: Connect) -> None:
    torch.manual_seed(7)
    expected = [F.dropout(torch.ones(50)) for _ in range(2)]
    async with connect() as one, connect() as other:
        for worker in (one, other):
            worker.manual_seed(7)
        for value in expected:
            for worker in (one, other):
                drawn = F.dropout(worker.send(torch.ones(50)))
                assert torch.equal(await modules.get(drawn), value)


async def _a_failure_poisons_what_depends_on_it_and_nothing_else(connect: Connect) -> None:
    async with connect() as worker:
        good = worker.send(torch.ones(3))
        bad = worker.send(torch.arange(3.0)).gather(0, worker.send(torch.tensor([7])))
        for pointer in (bad + 1, bad):
            error = await _raised(pointer.get(), RemoteError)
            assert error.op == "torch.Tensor.gather"
            assert error.type == "RuntimeError"
            assert "out of bounds" in error.message
            assert error.site
        assert torch.equal(await (good + 1).get(), torch.full((3,), 2.0))
        await worker.flush()  # it was told, and is not told again


async def _unknown_objects_are_not_found(connect: Connect) -> None:
    async with connect() as worker, connect() as other:
        mine = other.send(torch.ones(2))
        await other.flush()
        for id in (mine.id_at_location, 10_000):
            stray = make_pointer(worker.link, id + 5000, (2,), torch.float32)
            await _raised(stray.get(), NotFound)


async def _only_the_table_is_run(connect: Connect) -> None:
    names = ("torch.os.system", "torch.load", "__class__", "torch.Tensor.__class__", "os.system")
    async with connect() as worker:
        for name in names:
            id = worker.link.new_id()
            worker.link.issue(m.Execute(name, [id], [], {}, 0).wire())
            stray = make_pointer(worker.link, id, (), torch.float32)
            error = await _raised(stray.get(), OpNotAllowed)
            assert error.op == name


async def _two_sessions_share_nothing(connect: Connect) -> None:
    async with connect() as one, connect() as other:
        a, b = one.send(torch.ones(2)), other.send(torch.zeros(2))
        a.tag("#mine")
        assert len(await one.search("#mine")) == 1
        assert await other.search("#mine") == []
        try:
            a + b
        except NotCollocated:
            pass
        else:
            raise AssertionError("one operation ran on two sessions")
        assert torch.equal(await b.get(), torch.zeros(2))


async def _many_requests_are_answered_in_order(connect: Connect) -> None:
    async with connect() as worker:
        total = worker.send(torch.zeros(()))
        asked = []
        for _ in range(200):
            total = total + 1
            asked.append(total.get())
        assert [int(await each) for each in asked] == list(range(1, 201))


async def _a_closed_session_answers_nothing(connect: Connect) -> None:
    async with connect() as worker:
        pointer = worker.send(torch.ones(1))
        await worker.flush()
    try:
        pointer.get()
    except ConnectionLost:
        return
    raise AssertionError("a pointer outlived its session")


async def _raised(work: Awaitable[object], kind: type[RemoteError]) -> RemoteError:
    """The error that an awaitable raises, which has to be of this kind."""
    try:
        await work
    except RemoteError as raised:
        error = raised
    else:
        raise AssertionError(f"no {kind.__name__} was raised")
    assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}"
    return error


#: What is checked, in this order.
CHECKS: Final[tuple[Callable[[Connect], Awaitable[None]], ...]] = (
    _a_tensor_comes_back_as_it_was,
    _a_large_tensor_travels_in_chunks_both_ways,
    _what_is_sent_is_the_value_of_that_moment,
    _operations_run_in_order_and_equal_torch,
    _training_equals_torch_bit_for_bit,
    _random_numbers_follow_the_seed_of_the_session,
    _a_failure_poisons_what_depends_on_it_and_nothing_else,
    _unknown_objects_are_not_found,
    _only_the_table_is_run,
    _two_sessions_share_nothing,
    _many_requests_are_answered_in_order,
    _a_closed_session_answers_nothing,
)
