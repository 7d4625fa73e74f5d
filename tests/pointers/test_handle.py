"""What nobody holds is freed on the worker."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from wsfed import sync


def stored(worker: Any) -> int:
    """How many objects the worker holds for its only session."""
    (hosted,) = worker._node._sessions.values()
    return len(hosted.interpreter.store)


@pytest.fixture(autouse=True)
def without_collector() -> Any:
    """Counting references is enough: no pointer is part of a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def flush(worker: Any) -> None:
    # Deletes leave with the next thing that is sent, or many at once.
    worker.flush()
    worker.flush()


def test_a_dropped_pointer_is_freed(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    y = x + 1
    flush(bob)
    assert stored(bob) == 2
    del x
    flush(bob)
    assert stored(bob) == 1
    assert torch.equal(y.get(), torch.full((3,), 2.0))
    del y
    flush(bob)
    assert stored(bob) == 0


def test_what_lies_between_is_freed(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    y = ((x + 1) * 2).exp().sum()
    flush(bob)
    assert stored(bob) == 2
    del x, y
    flush(bob)
    assert stored(bob) == 0


def test_constants_are_freed(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    for _ in range(5):
        x = x + torch.ones(3)
        x.add_(torch.ones(3))
        x[torch.tensor([0, 1])] = torch.tensor(2.0)
    flush(bob)
    assert stored(bob) == 1


def test_a_training_loop_leaves_what_it_holds(bob: sync.VirtualWorker) -> None:
    model = bob.send(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x = bob.send(torch.randn(6, 3))
    held = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), torch.zeros(6, 1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        flush(bob)
        held.append(stored(bob))
    # Parameters, their gradients and two moments each, buffers, data and the loss.
    assert held[1:] == [held[1]] * 3
    assert held[-1] == 6 * 4 + 3 + 2
    sync.get(model)
    sync.get(optimizer)
    del x, loss
    flush(bob)
    assert stored(bob) == 0


def test_a_module_that_came_home_leaves_nothing(bob: sync.VirtualWorker) -> None:
    model = bob.send(nn.LSTM(2, 3))
    result, hidden = model(bob.send(torch.ones(4, 2)))
    result.sum().backward()
    sync.get(model)
    del result, hidden
    flush(bob)
    assert stored(bob) == 0


def test_failures_are_freed(bob: sync.VirtualWorker) -> None:
    lost = bob.send(torch.ones(3))[bob.send(torch.tensor([9]))] + 1
    with pytest.raises(wsfed.RemoteError):
        lost.get()
    del lost
    gc.collect()  # the error's traceback
    flush(bob)
    assert stored(bob) == 0


def test_moved_tensors_are_freed(bob: sync.VirtualWorker, alice: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    y = x.move(alice).move(bob).move(alice)
    assert torch.equal(y.get(), torch.ones(3))
    del x, y
    flush(bob)
    flush(alice)
    assert (stored(bob), stored(alice)) == (0, 0)


def test_views_and_gradients_are_freed(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3, requires_grad=True))
    y = x * 2
    y[0].mul_(3)
    y.sum().backward()
    grad = x.grad
    assert grad is not None
    del x, y, grad
    flush(bob)
    assert stored(bob) == 0


def test_a_closed_session_leaves_nothing() -> None:
    with sync.VirtualWorker("bob") as bob:
        x = bob.send(torch.ones(3))
        (hosted,) = bob._node._sessions.values()
    assert not bob._node._sessions
    assert len(hosted.interpreter.store) == 0
    del x


async def test_pointers_are_freed_from_any_thread(carol: wsfed.VirtualWorker) -> None:
    import threading

    held = [carol.send(torch.ones(3)) for _ in range(100)]
    await carol.flush()
    assert stored(carol) == 100
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    await carol.flush()
    await carol.flush()
    assert stored(carol) == 0


def test_what_is_large_is_freed_although_nothing_is_awaited() -> None:
    with sync.VirtualWorker("bob", max_memory=2**20) as bob:
        x = bob.send(torch.ones(50_000))  # 200 kB, of which five fit
        for _ in range(20):
            x = x + 1
        assert torch.equal(x.get(), torch.full((50_000,), 21.0))


def test_a_view_takes_no_memory() -> None:
    with sync.VirtualWorker("bob", max_memory=2**20) as bob:
        wide = bob.send(torch.ones(1000)).expand(1000, 1000)
        assert wide.sum().get() == 1e6
        with pytest.raises(wsfed.QuotaExceeded):
            wide.get()
