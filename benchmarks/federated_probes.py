"""Programs that are measured in a process of their own; each tells JSON in its last line.

python -m benchmarks.federated_probes fit MILLIONS ROUNDS URL ...      peak memory of a client
python -m benchmarks.federated_probes bare MILLIONS ROUNDS PORT ...    the same of the bare loop
python -m benchmarks.federated_probes virtual CLIENTS ROUNDS           many clients in one process
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import wsfed
from benchmarks import federated_loop
from benchmarks.federated_tasks import Large, Moving, large_objective, peak_memory
from wsfed import federated

__all__ = ["bare", "fit", "virtual"]

_STILL = partial(torch.optim.SGD, lr=0.0)


async def fit(millions: int, rounds: int, urls: list[str]) -> dict[str, Any]:
    """Peaks of a client: at its start, after a fit of a tiny model, and after one of a large."""
    peaks = {"start": peak_memory()}
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(wsfed.connect(url)) for url in urls]
        train = partial(federated.fit, workers=workers, dataset="rows", optimizer=_STILL)
        await train(Large(0), objective=large_objective, fields=["x"], rounds=2)
        peaks["tiny"] = peak_memory()
        train = partial(train, strategy=Moving())
        await train(Large(millions), objective=large_objective, fields=["x"], rounds=rounds)
        peaks["large"] = peak_memory()
    return peaks


async def bare(millions: int, rounds: int, ports: list[str]) -> dict[str, Any]:
    """The same peaks of the bare loop, which loads nothing for a tiny model."""
    peaks = {"start": peak_memory()}
    async with federated_loop.connected([int(port) for port in ports]) as loop:
        peaks["tiny"] = peak_memory()
        state = parameters_to_vector(Large(millions).parameters()).detach()
        for _ in range(rounds):
            state = (await loop.round(state)).state
        peaks["large"] = peak_memory()
    return peaks


async def virtual(clients: int, rounds: int) -> dict[str, Any]:
    """Rounds of many data sets on one virtual worker, and the memory of all of it."""
    start = peak_memory()
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    datasets = []
    for number in range(clients):
        x = torch.randn(20, 20, generator=generator)
        datasets.append(wsfed.Dataset(f"client-{number}", {"x": x, "y": (x.sum(1) > 0).long()}))
    async with wsfed.VirtualWorker("all", datasets=datasets) as worker:
        history = await federated.fit(
            nn.Linear(20, 2),
            [worker],
            "client-*",
            F.cross_entropy,
            partial(torch.optim.SGD, lr=0.1),
            rounds=rounds + 1,
        )
    seconds = history.series("seconds")
    return {
        "rounds": seconds[1:],
        "first": seconds[0],
        "set-up": time.perf_counter() - begun - sum(seconds),
        "start": start,
        "peak": peak_memory(),
        "sites": len(history[-1].sites),
        "loss": history[-1].loss,
    }


def main(name: str, size: str, rounds: str, *rest: str) -> None:
    """Run one and tell."""
    torch.set_num_threads(1)
    if name == "virtual":
        told = asyncio.run(virtual(int(size), int(rounds)))
    else:
        told = asyncio.run({"fit": fit, "bare": bare}[name](int(size), int(rounds), list(rest)))
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
