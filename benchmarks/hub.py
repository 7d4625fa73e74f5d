"""What a hub costs: to start, to hold idle nodes, and to relay.

    python -m benchmarks.hub                     all of it, about two minutes
    python -m benchmarks.hub --nodes 1000        how many idle nodes (5000)
    python -m benchmarks.hub --quick             fewer repetitions

Prints JSON. Ways through the hub and past it take turns, and the median of each is shown. A node
needs a file descriptor in the hub and one in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import wsfed
from benchmarks import ours
from benchmarks.cost import memory_of
from benchmarks.machine import machine
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.testing import hub_process, worker_process
from wsfed.transport.line import Line, open_line

MIB: Final = 2**20
#: Nodes that dial at once.
_AT_ONCE: Final = 50


def cpu_of(process: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def idle_nodes(counts: Sequence[int]) -> dict[str, Any]:
    """What a hub costs at its start, and with so many nodes that only are there."""
    with hub_process() as hub:
        process = hub["pid"]
        found: dict[str, Any] = {"CPU-s to start": cpu_of(process), "MiB": memory_of(process)}
        begun_with = memory_of(process)
        lines: list[Line] = []
        try:
            for count in counts:
                spent, begun = cpu_of(process), time.perf_counter()
                before = len(lines)
                await _enrol(hub["url"], lines, count)
                joined = count - before
                found[f"{count} idle nodes"] = {
                    "KiB a node": (memory_of(process) - begun_with) * 1024 / count,
                    "ms of CPU to enrol one": (cpu_of(process) - spent) / joined * 1e3,
                    "seconds until all were there": time.perf_counter() - begun,
                }
            found["CPU of a core for their signs of life, %"] = await _signs_of_life(lines, process)
        finally:
            await asyncio.gather(*(line.wire.close() for line in lines))
    return found


async def _signs_of_life(lines: Sequence[Line], process: int) -> float:
    """What the hub works while nodes only show that they live, each once a heartbeat."""
    staying = [asyncio.ensure_future(line.hear()) for line in lines]
    try:
        await asyncio.sleep(limits.HEARTBEAT_SECONDS)
        spent, begun = cpu_of(process), time.perf_counter()
        await asyncio.sleep(limits.HEARTBEAT_SECONDS)
        return (cpu_of(process) - spent) / (time.perf_counter() - begun) * 100
    finally:
        for each in staying:
            each.cancel()
        await asyncio.gather(*staying, return_exceptions=True)


async def _enrol(url: str, lines: list[Line], count: int) -> None:
    while len(lines) < count:
        names = range(len(lines), min(count, len(lines) + _AT_ONCE))
        opened = await asyncio.gather(*(_dial(url, f"node-{number}") for number in names))
        lines.extend(opened)


async def _dial(url: str, name: str) -> Line:
    said = m.Enrol(m.VERSION, None, name, os.urandom(16), "portable", ["digits"], ["mm@1"])
    line, _ = await open_line(url, said, (m.Enrolled,))
    return line


async def relayed(repetitions: int) -> dict[str, dict[str, float]]:
    """Latency and bandwidth of a worker process that listens, and of one behind a hub."""
    with ExitStack() as stack:
        hub = stack.enter_context(hub_process())
        direct = stack.enter_context(worker_process("--id", "direct", "--threads", "1"))
        stack.enter_context(
            worker_process("--connect", hub["url"], "--id", "behind", "--threads", "1")
        )
        started = {"CPU-s to start": cpu_of(direct["pid"]), "MiB": memory_of(direct["pid"])}
        async with (
            wsfed.hub(hub["url"]) as client,
            client.worker("behind") as behind,
            wsfed.connect(direct["url"]) as listening,
        ):
            ways = {"direct": listening, "through the hub": behind}
            taken: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
            spent: list[float] = []
            for turn in range(repetitions + 1):
                for name, worker in ways.items():
                    before = cpu_of(hub["pid"])
                    up, down = await ours.bulk(worker, 64 * MIB)
                    used = cpu_of(hub["pid"]) - before
                    one = await ours.get_scalar(worker)
                    if turn:
                        for what, value in (
                            ("one value, µs", one * 1e6),
                            ("64 MiB up, MiB/s", 64 / up),
                            ("64 MiB down, MiB/s", 64 / down),
                        ):
                            taken[name].setdefault(what, []).append(value)
                        if name != "direct":
                            spent.append(used / 128 * 1024)
    found = {
        name: {what: statistics.median(values) for what, values in each.items()}
        for name, each in taken.items()
    }
    found["through the hub"]["the hub's CPU, s a GiB"] = statistics.median(spent)
    return {"a worker, for comparison": started, **found}


async def measure(nodes: int, repetitions: int) -> dict[str, Any]:
    """Everything."""
    counts = [1000, nodes] if nodes > 1000 else [nodes]
    return {
        "machine": machine(),
        "idle": await idle_nodes(counts),
        "relayed": await relayed(repetitions),
    }


def main() -> int:
    """Run the program; gives its exit code."""
    parser = argparse.ArgumentParser(description="What a hub costs.")
    parser.add_argument("--nodes", type=int, default=5000, help="how many idle nodes")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    results = asyncio.run(measure(options.nodes, 2 if options.quick else 7))
    sys.stdout.write(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
