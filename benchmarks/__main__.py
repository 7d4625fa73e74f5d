"""Print one table of everything that is measured.

    python -m benchmarks                 all of it, about three minutes
    python -m benchmarks --quick         fewer repetitions
    python -m benchmarks --out FOLDER    where benchmarks.json and benchmarks.png go (runs/)
    python -m benchmarks --page FILE     writes the tables as a page, too (docs/performance.md)

Repetitions of the systems take turns, and the median of each is shown. Only the ratios carry over
to other machines.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed import rpc as torch_rpc

import wsfed
from benchmarks import ours, rpc, sockets
from benchmarks.cost import breakdown, growth, memory_of, of_a_step
from benchmarks.machine import machine
from benchmarks.tasks import TASKS, Task, write_data
from wsfed import sync
from wsfed.testing import worker_process

CHECKOUT: Final = Path(__file__).resolve().parent.parent
MIB: Final = 2**20

Repetition: TypeAlias = Callable[[], float | Awaitable[float]]


async def medians(systems: Mapping[str, Repetition], repetitions: int) -> dict[str, float]:
    """Seconds of a repetition of each system, which take turns; the first turn is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(repetitions + 1):
        for name, repetition in systems.items():
            seconds = repetition()
            seconds = await seconds if inspect.isawaitable(seconds) else seconds
            if turn:
                taken[name].append(seconds)
    return {name: statistics.median(each) for name, each in taken.items()}


async def training(
    task: Task, remote: wsfed.Worker, blocking: sync.Worker | None, repetitions: int
) -> dict[str, float]:
    """Milliseconds of a step, by system."""
    systems: dict[str, Repetition] = {
        "in-process torch": ours.in_process(task),
        "wsfed, op by op": ours.op_by_op(task, remote),
        "wsfed, losses asked for": ours.op_by_op(task, remote, "asked"),
        "wsfed, losses awaited": ours.op_by_op(task, remote, "awaited"),
        "wsfed plan": ours.plan(task, remote),
        "wsfed plan over a data set": ours.over_data(task, remote),
    }
    if blocking is not None:
        systems["wsfed.sync"] = ours.blocking(task, blocking)
    if torch_rpc.is_available():
        systems["torch RPC, remote function"] = rpc.remote_function(task)
        if task.name == "MLP, SGD":
            systems["torch RPC, op by op"] = rpc.op_by_op(task)
    seconds = await medians(systems, repetitions)
    return {name: each / task.steps * 1e3 for name, each in seconds.items()}


async def links(remote: wsfed.Worker, repetitions: int) -> dict[str, dict[str, float]]:
    """Small operations, one value, and bulk, beside what websockets give."""
    count = 2000
    systems: dict[str, Repetition] = {"wsfed": ours.small_ops(count, remote)}
    if torch_rpc.is_available():
        systems["torch RPC"] = rpc.small_ops(count)
    small = await medians(systems, repetitions)
    async with sockets.serving() as raw:
        one = await medians(
            {
                "wsfed get": lambda: ours.get_scalar(remote),
                "websockets echo": lambda: sockets.echo(raw),
            },
            repetitions,
        )
        ways: dict[str, list[tuple[float, float]]] = {}
        for _ in range(repetitions + 1):
            for name, taken_by in (
                ("wsfed", ours.bulk(remote, 64 * MIB)),
                ("websockets, copied and kept,", sockets.tensor(raw, 64 * MIB)),
                ("websockets, thrown away,", sockets.bulk(raw, 64 * MIB)),
            ):
                ways.setdefault(name, []).append(await taken_by)
    bulk = {
        f"{name} {way}": 64 / statistics.median(each[place] for each in taken[1:])
        for name, taken in ways.items()
        for place, way in enumerate(("up", "down"))
    }
    return {
        "Dependent operations, 1/s": {name: count / each for name, each in small.items()},
        "One value, µs": {name: each * 1e6 for name, each in one.items()},
        "64 MiB, MiB/s": bulk,
    }


async def where_it_goes(remote: wsfed.Worker, process: int, repetitions: int) -> dict[str, float]:
    """Milliseconds of CPU of a step through pointers, by thread."""
    found: dict[str, float] = {}
    for name in ("MLP, SGD", "transformer, SGD"):
        task = TASKS[name]
        ways = {"op by op": ours.op_by_op(task, remote), "plan": ours.plan(task, remote)}
        taken: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for turn in range(repetitions + 1):
            for way, repetition in ways.items():
                spent = await of_a_step(repetition, task.steps, process)
                if turn:
                    taken[way].append(spent)
        for way, each in taken.items():
            for thread in each[0]:
                found[f"{task.name}, {way}: {thread}"] = statistics.median(s[thread] for s in each)
    return found


async def far_away(url: str, repetitions: int) -> dict[str, float]:
    """Milliseconds of a step of the MLP over a link of 50 ms a round trip."""
    task, port = TASKS["MLP, SGD"], urlsplit(url).port
    assert port is not None
    async with (
        sockets.delayed(port, 0.025) as delayed,
        wsfed.connect(f"ws://127.0.0.1:{delayed}") as remote,
    ):
        systems: dict[str, Repetition] = {
            "wsfed, op by op": ours.op_by_op(task, remote),
            "wsfed, losses asked for": ours.op_by_op(task, remote, "asked"),
        }
        seconds = await medians(systems, repetitions)
    return {name: each / task.steps * 1e3 for name, each in seconds.items()}


async def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything."""
    repetitions = 3 if options.quick else 7
    results: dict[str, Any] = {"machine": machine(), "training, ms a step": {}}
    with ExitStack() as stack:
        data = write_data(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        started = stack.enter_context(worker_process("--threads", "1", *data))
        url, process = started["url"], started["pid"]
        if torch_rpc.is_available():
            stack.enter_context(rpc.running(free_port()))
        blocking = stack.enter_context(sync.connect(url))
        async with AsyncExitStack() as connected:
            remote = await connected.enter_async_context(wsfed.connect(url))
            for task in TASKS.values():
                with console.status(task.name):
                    steps = await training(task, remote, blocking, repetitions)
                results["training, ms a step"][task.name] = steps
            with console.status("links"):
                results |= await links(remote, repetitions)
            with console.status("50 ms away"):
                results["MLP, SGD, 50 ms away, ms a step"] = await far_away(url, repetitions)
            with console.status("costs"):
                results["CPU of a step, ms"] = await where_it_goes(remote, process, repetitions)
                results["An elementwise operation, µs of the client's CPU"] = breakdown()
                results["The same beside so many live pointers, µs"] = growth()
                results["Memory, MiB"] = await ours.grown(remote, lambda: memory_of(process))
    return results


def free_port() -> int:
    """A port that was free a moment ago; torch RPC takes no 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- showing --------------------------------------------------------------------------------------


def show(results: Mapping[str, Any], console: Console) -> None:
    """Tables."""
    training_results = results["training, ms a step"]
    names = list(dict.fromkeys(name for steps in training_results.values() for name in steps))
    table = Table(title="speed of in-process torch = 1 (ms a step)")
    table.add_column("system")
    for task in training_results:
        table.add_column(task, justify="right")
    for name in names:
        row = []
        for steps in training_results.values():
            speed = f"{steps['in-process torch'] / steps[name]:.2f}" if name in steps else ""
            row.append(f"{speed} ({steps[name]:.2f})" if name in steps else "")
        table.add_row(name, *row)
    console.print(table)
    for title, figures in results.items():
        if title in ("machine", "training, ms a step"):
            continue
        table = Table(title=title, show_header=False)
        for name, figure in figures.items():
            table.add_row(name, number(figure))
        console.print(table)


PAGE: Final = """\
# Performance

Measured by `python -m benchmarks --page docs/performance.md`: the systems take turns in one run,
the median of each is shown. One client process, one worker process of one thread, loopback. **Only
the ratios carry over** to other machines; no test asserts a time.

A step of training through pointers is two or three dozen commands, of which nothing waits but the
last loss. The client is done long before the worker ("CPU of a step"); what decides is the worker,
where the thread that runs operations and the event loop share Python's interpreter lock, so that
what the loop does comes on top, and 10 to 15 µs for each command: looking up its tensors, its
result's size, the result's place. Small operations feel that, large ones do not. A
[plan](plans.md) is one message a step, or one for all of them, and its worker runs a list of calls.
For Adam over a data set the client works first, on the counts of all steps.

One value takes two event loops to their next turn, as an echo does, and three times as much
Python: the session's numbering and acknowledgements, msgpack and its checks, a copy of the value,
the future. Ask for many at once instead (`loss.get()` leaves when it is called; await it later, or
`.add_done_callback(...)`).

Of a large tensor's way most is memory: what is sent is copied first, as the program may write to
it in the next line, and what is received goes to pages that nobody has used yet. `websockets` that
does the same is the floor; where pieces are thrown away as they come, it does nothing of that.

"""


def page(results: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    machine_told = ", ".join(f"{name} {told}" for name, told in results["machine"].items())
    training_results = results["training, ms a step"]
    names = list(dict.fromkeys(name for steps in training_results.values() for name in steps))
    lines = [PAGE + f"{machine_told}.", "", "## Training", ""]
    lines += ["Speed of in-process torch = 1, and milliseconds a step.", ""]
    lines += [f"| system | {' | '.join(training_results)} |"]
    lines += ["|---" * (1 + len(training_results)) + "|"]
    for name in names:
        cells = [
            f"{steps['in-process torch'] / steps[name]:.2f} ({steps[name]:.2f})"
            if name in steps
            else ""
            for steps in training_results.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for title, figures in results.items():
        if title not in ("machine", "training, ms a step"):
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {number(figure)} |" for name, figure in figures.items()]
    return "\n".join(lines) + "\n"


def number(figure: float) -> str:
    """A figure with as many digits as mean something."""
    return f"{figure:,.2f}" if figure < 100 else f"{figure:,.0f}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Speed of a training step, of in-process torch's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    training_results = results["training, ms a step"]
    names = list(dict.fromkeys(name for steps in training_results.values() for name in steps))
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    width = 0.9 / len(names)
    for place, name in enumerate(names):
        speeds = [
            steps["in-process torch"] / steps[name] if name in steps else 0.0
            for steps in training_results.values()
        ]
        axes.bar([at + place * width for at in range(len(speeds))], speeds, width, label=name)
    axes.set_xticks(
        [at + 0.45 - width / 2 for at in range(len(training_results))], list(training_results)
    )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_ylabel("speed, in-process torch = 1")
    figure.legend(loc="outside lower center", fontsize=8, ncols=5)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "runs")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables as Markdown")
    options, console = parser.parse_args(argv), Console()
    torch.set_num_threads(1)
    begun = time.monotonic()
    results = asyncio.run(measure(options, console))
    show(results, console)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmarks.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, options.out / "benchmarks.png")
    if options.page:
        options.page.write_text(page(results), encoding="utf-8")
    console.print(f"{options.out}/benchmarks.json, .png; {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
