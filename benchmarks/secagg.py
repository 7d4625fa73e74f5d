"""Print what a round of secure aggregation takes: processor time of a worker and of who adds up.

    python -m benchmarks.secagg                                  100 workers, 1M parameters
    python -m benchmarks.secagg --workers 10 --parameters 100000
    python -m benchmarks.secagg --lost 10                        of them lost before they mask

All members play a whole round in this process, each step as its worker takes it, one after the
other; the bytes are those of a round of training of five workers over sockets. Seconds are of the
processor, on one thread: goals are 0.15 for a worker, and 4.1 bytes up per parameter.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Final, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import wsfed
from benchmarks.machine import machine
from wsfed import federated
from wsfed.privacy.masks import dequantise
from wsfed.privacy.roster import Membership, Roster, new_key, public_key
from wsfed.privacy.secagg import (
    EXTRA,
    Collector,
    Numbers,
    least_threshold,
    pack,
    unpack_members,
    unpack_table,
)
from wsfed.tensors import hash_of
from wsfed.worker.secagg import SecureRounds

__all__ = ["Cost", "bytes_per_parameter", "main", "play"]

_T = TypeVar("_T")
#: What a worker does in each step of the protocol.
STEPS: Final = ("hash, keys", "share", "open", "quantise, mask", "confirm", "unmask")


@dataclass(slots=True)
class Cost:
    """Processor seconds.

    Attributes:
        worker: by step, of each member that took it.
        collector: adding up, and the rest of what it does.
        error: largest difference of the mean from the plain one, in units of the bound.
    """

    worker: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    collector: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    error: float = float("inf")

    @property
    def of_a_worker(self) -> float:
        """Of all six steps; the median of the members in each of them."""
        return sum(median(each) for each in self.worker.values())

    def step(self, number: int, work: Callable[[], _T]) -> _T:
        """Take a worker's step."""
        begun = time.thread_time()
        made = work()
        self.worker[number].append(time.thread_time() - begun)
        return made

    def collect(self, what: str, work: Callable[[], _T]) -> _T:
        """Do a part of what is the collector's."""
        begun = time.thread_time()
        made = work()
        self.collector[what] += time.thread_time() - begun
        return made


def play(workers: int, parameters: int, lost: int = 0) -> Cost:
    """One round of honest members.

    Args:
        workers: members of the roster.
        parameters: values that each contributes.
        lost: members that share their secrets and send no vector.
    """
    keys = {f"w{number:03}": new_key() for number in range(1, workers + 1)}
    public = {name: public_key(key) for name, key in keys.items()}
    roster = Roster("measured", 1, public, bound=1.0)
    given = [torch.randn(parameters // 1000, 1000)]
    # Two kinds, of a norm that is not clipped, to save memory.
    values = [[given[0] + torch.randn(given[0].shape) / parameters**0.5 / 2] for _ in range(2)]
    length = given[0].numel() + EXTRA
    numbers = Numbers(b"s" * 16, 1, 0, least_threshold(workers), length, 1.0, 64)
    members = {
        u: SecureRounds(Membership(name, keys[name], roster))
        for u, name in enumerate(roster.order, 1)
    }
    cost, collector = Cost(), Collector(roster, numbers, hash_of(given))

    def ask(u: int, step: int, told: bytes) -> torch.Tensor:
        mine = values[u % 2] if step == 3 else []
        model = given if step in (0, 3) else []
        return cost.step(step, lambda: members[u].step(step, told, "rows", 64, mine, model))

    def raw(u: int, step: int, told: bytes) -> bytes:
        return bytes(ask(u, step, told).numpy())

    for u in members:
        collector.add_keys(u, raw(u, 0, numbers.packed))
    told = pack(collector.all_keys())
    for u in members:
        collector.add_shares(u, unpack_table(raw(u, 1, told)))
    sealed = collector.shares_for()
    for u in members:
        collector.add_opened(u, unpack_members(raw(u, 2, pack(sealed[u]))))
    u2, _ = collector.members_that_mask()
    for u in u2[lost:]:
        vector = ask(u, 3, pack(u2)).numpy().view(np.uint32)
        cost.collect("adding vectors", partial(collector.add_masked, u, vector))
    u3 = collector.members_of_sum()
    for u in u3:
        signature = raw(u, 4, pack(u3))
        cost.collect("signatures", partial(collector.add_signature, u, signature))
    signatures = pack(collector.all_signatures())
    for u in u3:
        collector.add_unmasking(u, unpack_table(raw(u, 5, signatures)))
    total, _ = cost.collect("removing masks", collector.total)
    cost.error = _error(total, roster, [(values[u % 2][0] - given[0]) for u in u3])
    return cost


def _error(total: Any, roster: Roster, changes: Sequence[torch.Tensor]) -> float:
    mean = dequantise(total[:-EXTRA], len(roster.members), roster.reach) / len(changes)
    expected = sum(each.double() for each in changes) / len(changes)
    return float(np.abs(mean - expected.reshape(-1).numpy()).max())  # type: ignore[union-attr]


async def bytes_per_parameter(parameters: int, workers: int = 5) -> list[float]:
    """Of one round of training over sockets: bytes that each worker has sent, per parameter."""
    keys = {f"w{number}": new_key() for number in range(workers)}
    roster = Roster("measured", 1, {name: public_key(key) for name, key in keys.items()})
    model = nn.Linear(1000, parameters // 1000, bias=False)
    rows = {"x": torch.randn(32, 1000), "y": torch.zeros(32, dtype=torch.int64)}
    async with AsyncExitStack() as stack:
        connected = []
        for name, key in keys.items():
            data = [wsfed.Dataset("rows", rows)]
            node = wsfed.Node(name, datasets=data, membership=Membership(name, key, roster))
            await stack.enter_async_context(node)
            url = await stack.enter_async_context(node.listen())
            connected.append(await stack.enter_async_context(wsfed.connect(url)))
        await federated.fit(
            *(model, connected, "rows", F.cross_entropy, partial(torch.optim.SGD, lr=0.1)),
            rounds=1,
            privacy=federated.SecAgg(roster),
        )
        return [each.traffic[1] / model.weight.numel() for each in connected]


def show(options: argparse.Namespace, console: Console) -> None:
    """Measure and print."""
    cost = play(options.workers, options.parameters, options.lost)
    up = max(asyncio.run(bytes_per_parameter(options.parameters)))
    size = f"{options.workers} workers, {options.parameters:,} parameters, {options.lost} lost"
    table = Table("", "s", "most", title=size)
    for number, name in enumerate(STEPS):
        times = cost.worker[number]
        table.add_row(f"a worker: {name}", f"{median(times):.4f}", f"{max(times):.4f}")
    table.add_row("a worker, together", f"{cost.of_a_worker:.4f}", "")
    for name, seconds in cost.collector.items():
        table.add_row(f"who adds up: {name}", f"{seconds:.4f}", "")
    console.print(table)
    console.print(f"error of the mean {cost.error:.1e}; bytes up per parameter {up:.4f}")
    console.print(machine())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Measure a round of secure aggregation.")
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--lost", type=int, default=0)
    show(parser.parse_args(arguments), Console())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
