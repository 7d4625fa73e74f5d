"""torch's own RPC: one worker process, tensors behind RRefs.

python -m benchmarks.rpc PORT        the worker's side, started by the benchmark
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import rpc
from torch.nn import functional as F

from benchmarks.tasks import TASKS, Task, loss_of

__all__ = ["op_by_op", "remote_function", "running", "small_ops"]

_WORKER = "worker"


@contextmanager
def running(port: int) -> Iterator[None]:
    """A worker process, and this one as its client."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.rpc", str(port)])
    try:
        _join("client", 0, port)
        yield
        rpc.shutdown()
    finally:
        process.terminate()
        process.wait()


def _join(name: str, rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"TP_SOCKET_IFNAME": "lo"}
    options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=120)
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


# --- on the worker --------------------------------------------------------------------------------


def _apply(function: Callable[..., Any], *args: Any) -> Any:
    values = [arg.local_value() if isinstance(arg, rpc.PyRRef) else arg for arg in args]
    return function(*values)


def _leaf(value: torch.Tensor) -> torch.Tensor:
    return value.requires_grad_()


def _backward(loss: torch.Tensor) -> None:
    loss.backward()


def _update(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.add_(parameter.grad, alpha=-0.05)  # type: ignore[arg-type]
    parameter.grad = None


class _Trainer:
    """What a remote function finds on its side."""

    def __init__(self, name: str) -> None:
        self.task = TASKS[name]
        self.model, self.x, self.y = self.task.start()
        self.optimizer = self.task.optimizer(self.model.parameters())

    def step(self) -> torch.Tensor:
        """One training step."""
        self.optimizer.zero_grad()
        loss = loss_of(self.model, self.x, self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _step(trainer: _Trainer) -> torch.Tensor:
    return trainer.step()


# --- here -----------------------------------------------------------------------------------------


def op_by_op(task: Task) -> Callable[[], float]:
    """The MLP's step, each operation a call on RRefs; gives a repetition that gives seconds."""
    model, x, y = task.start()
    assert isinstance(model, nn.Sequential)

    def send(function: Callable[..., Any], *args: Any) -> Any:
        return rpc.remote(_WORKER, _apply, args=(function, *args))

    inputs, labels = send(torch.clone, x), send(torch.clone, y)
    layers = [
        [send(_leaf, parameter.detach()) for parameter in layer.parameters()] for layer in model
    ]
    parameters = [each for layer in layers for each in layer]

    def step() -> Any:
        hidden = inputs
        for layer in layers:
            hidden = send(F.linear, hidden, *layer) if layer else send(F.relu, hidden)
        loss = send(F.cross_entropy, hidden, labels)
        send(_backward, loss).to_here()
        # Calls run in any order, so that the next step has to wait for these.
        updates = [rpc.rpc_async(_WORKER, _apply, args=(_update, each)) for each in parameters]
        torch.futures.wait_all(updates)
        return loss

    def repetition() -> float:
        begun = time.perf_counter()
        for _ in range(task.steps):
            loss = step()
        loss.to_here()
        return time.perf_counter() - begun

    return repetition


def remote_function(task: Task) -> Callable[[], float]:
    """A step is one call of a function that is on the worker's side."""
    trainer = rpc.remote(_WORKER, _Trainer, args=(task.name,))

    def repetition() -> float:
        begun = time.perf_counter()
        for _ in range(task.steps):
            rpc.rpc_sync(_WORKER, _apply, args=(_step, trainer))
        return time.perf_counter() - begun

    return repetition


def small_ops(count: int) -> Callable[[], float]:
    """Additions that depend on each other."""
    start = rpc.remote(_WORKER, _apply, args=(torch.ones, 16))

    def repetition() -> float:
        begun = time.perf_counter()
        value = start
        for _ in range(count):
            value = rpc.remote(_WORKER, _apply, args=(torch.add, value, 1.0))
        value.to_here()
        return time.perf_counter() - begun

    return repetition


if __name__ == "__main__":
    torch.set_num_threads(1)
    _join(_WORKER, 1, int(sys.argv[1]))
    rpc.shutdown()
