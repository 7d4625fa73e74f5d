"""What is measured of ``fit``; every case gives one table."""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

import wsfed
from benchmarks import federated_anchor as anchors
from benchmarks import federated_flower, federated_loop
from benchmarks.federated_tasks import (
    MB,
    Large,
    Moving,
    all_entered,
    cpu_seconds,
    large_objective,
    mlp,
    started,
    told_by,
    write_rows,
    write_separable,
)
from wsfed import federated

__all__ = [
    "CASES",
    "Found",
    "Row",
    "anchor",
    "cold",
    "compression",
    "flower",
    "large",
    "lost",
    "overhead",
    "virtual",
]

_SGD: Final = partial(torch.optim.SGD, lr=0.05)
_STILL: Final = partial(torch.optim.SGD, lr=0.0)
_PROBES: Final = "benchmarks.federated_probes"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table.

    Attributes:
        what: is measured.
        figures: in the order of the columns; words where there is no number.
        target: at most so much.
    """

    what: str
    figures: Sequence[float | str]
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a case has found.

    Attributes:
        title: of the table.
        columns: of figures.
        rows: lines.
        notes: below the table.
    """

    title: str
    columns: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, *figures: float | str, target: float | None = None) -> None:
        """One more line."""
        self.rows.append(Row(what, figures, target))

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


#: What the program was told: its options.
Options: TypeAlias = argparse.Namespace


# --- overhead -------------------------------------------------------------------------------------


async def overhead(options: Options) -> list[Found]:
    """What a round takes beyond training, beside the bare loop."""
    rounds = options.rounds or 10
    return [await _overhead(count, rounds) for count in options.workers]


@dataclass(slots=True)
class _Taken:
    """Seconds of each round: all, of the slowest site, and of training alone; CPU per client."""

    rounds: list[float] = field(default_factory=list)
    slowest: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


async def _overhead(count: int, rounds: int, turns: int = 3) -> Found:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = [write_rows(folder / f"{at}.npz", 64, at) for at in range(count)]
        told = started(stack, count, each=[["--dataset", f"rows={path}"] for path in data])
        bare = all_entered(stack, [federated_loop.bare_worker(str(path)) for path in data])
        async with AsyncExitStack() as connections:
            workers = [
                await connections.enter_async_context(wsfed.connect(each["url"])) for each in told
            ]
            loop = await connections.enter_async_context(
                federated_loop.connected([each["port"] for each in bare])
            )
            ours, floor = _Taken(), _Taken()
            for _ in range(turns):
                await _our_rounds(workers, [each["pid"] for each in told], rounds, ours)
                await _bare_rounds(loop, [each["pid"] for each in bare], rounds, floor)
    return _overhead_found(count, ours, floor)


async def _our_rounds(
    workers: Sequence[Any], processes: Sequence[int], rounds: int, taken: _Taken
) -> None:
    """One fit; its first round is not counted: it records the plan."""
    used: list[float] = []

    def everyone(candidates: Any, round: int, seed: int) -> federated.Selection:
        used.append(time.process_time() + sum(map(cpu_seconds, processes)))
        return federated.Everyone()(candidates, round, seed)

    torch.manual_seed(0)
    history = await federated.fit(
        mlp(), workers, "rows", F.cross_entropy, _SGD, rounds=rounds + 1, sampler=everyone
    )
    taken.rounds += [each.seconds for each in history[1:]]
    taken.slowest += [max(site.seconds for site in each.sites) for each in history[1:]]
    if rounds > 1:
        taken.cpu.append((used[-1] - used[1]) / (rounds - 1) / len(workers))


async def _bare_rounds(
    loop: federated_loop.Loop, processes: Sequence[int], rounds: int, taken: _Taken
) -> None:
    torch.manual_seed(0)
    state = parameters_to_vector(mlp().parameters()).detach()
    state = (await loop.round(state)).state
    begun = time.process_time() + sum(map(cpu_seconds, processes))
    for _ in range(rounds):
        round = await loop.round(state)
        state = round.state
        taken.rounds.append(round.seconds)
        taken.slowest.append(round.slowest)
        taken.training.append(round.training)
    used = time.process_time() + sum(map(cpu_seconds, processes)) - begun
    taken.cpu.append(used / rounds / len(processes))


def _overhead_found(count: int, ours: _Taken, floor: _Taken) -> Found:
    target = 20.0 if count <= 2 else 100.0
    training = statistics.median(floor.training) * 1e3
    found = Found(f"{count} workers, small MLP, ms a round (median)", ["wsfed", "bare loop"])
    middle = {
        name: (_ms(getattr(ours, name)), _ms(getattr(floor, name)))
        for name in ("rounds", "slowest", "cpu")
    }
    found.add("a round", *middle["rounds"])
    found.add("of which the slowest site", *middle["slowest"])
    beyond = [_ms([r - s for r, s in zip(t.rounds, t.slowest, strict=True)]) for t in (ours, floor)]
    found.add("beyond the slowest site", *beyond, target=target)
    found.add("slowest training in plain torch", "", training)
    found.add("beyond training", *(each - training for each in middle["rounds"]), target=target)
    found.add("CPU of client and worker, for each client", *middle["cpu"])
    found.notes.append(
        "a site's seconds are all between its first command and the last byte of its answer"
    )
    return found


def _ms(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1e3 if seconds else math.nan


# --- a large model --------------------------------------------------------------------------------


async def large(options: Options) -> list[Found]:
    """A model whose bytes are all that counts."""
    rounds, millions = options.rounds or 3, options.millions
    nbytes = (millions * 1_000_000 + 1) * 4
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = write_rows(folder / "rows.npz", 1, 0, 1)
        told = started(stack, 2, "--dataset", f"rows={data}")
        bare = all_entered(
            stack, [federated_loop.bare_worker(values=nbytes // 4) for _ in range(2)]
        )
        ours, floor = await _large_rounds(told, bare, rounds, millions)
        urls, ports = [each["url"] for each in told], [str(each["port"]) for each in bare]
        size = (str(millions), str(rounds))
        peaks = told_by(_PROBES, "fit", *size, *urls)
        bare_peaks = told_by(_PROBES, "bare", *size, *ports)
    found = Found(f"{nbytes // MB} MB × 2 workers, no training", ["wsfed", "bare loop"])
    seconds = [statistics.median(each) for each in (ours, floor)]
    found.add("a round, s (median)", *seconds)
    found.add("bare loop = 1", seconds[0] / seconds[1], 1.0, target=1.3)
    found.add("there and back, MB/s", *(4 * nbytes / MB / each for each in seconds))
    both = (peaks, bare_peaks)
    found.add("client's memory at its start, MB", *(each["start"] / MB for each in both))
    found.add("peak above its start, MB", *((p["large"] - p["start"]) / MB for p in both))
    for what, before, target in (
        ("the same in models", "start", 4.0),
        ("above the peak with a tiny model, in models", "tiny", None),
    ):
        models = [(each["large"] - each[before]) / nbytes for each in both]
        found.add(what, *models, target=target)
    found.notes.append(
        "the model itself is in the peak; with a tiny model is what code takes: optimizers load "
        "torch's compiler"
    )
    return [found]


async def _large_rounds(
    told: Sequence[Mapping[str, Any]],
    bare: Sequence[Mapping[str, Any]],
    rounds: int,
    millions: int,
    turns: int = 3,
) -> tuple[list[float], list[float]]:
    """Seconds of each round of both, which take turns; the first of each turn is not counted."""
    ours: list[float] = []
    floor: list[float] = []
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(wsfed.connect(each["url"])) for each in told]
        ports = [each["port"] for each in bare]
        loop = await stack.enter_async_context(federated_loop.connected(ports))
        torch.manual_seed(0)
        model = Large(millions)
        state = parameters_to_vector(model.parameters()).detach()
        train = partial(federated.fit, model, workers, "rows", None, _STILL, fields=["x"])
        for _ in range(turns):
            history = await train(rounds=rounds + 1, objective=large_objective, strategy=Moving())
            ours += history.series("seconds")[1:]
            floor += [(await loop.round(state)).seconds for _ in range(rounds + 1)][1:]
    return ours, floor


# --- compression ----------------------------------------------------------------------------------


#: What is compared, as it is written.
_COMPRESSIONS: Final[Mapping[str, Any]] = {
    "none": None,
    '"fp16"': "fp16",
    '"bf16"': "bf16",
    '"int8"': "int8",
    '"int4"': "int4",
    "TopK(0.1)": federated.TopK(0.1),
    "TopK(0.01)": federated.TopK(0.01),
    'Compression(TopK(0.01), Cast("bf16"))': federated.Compression(
        federated.TopK(0.01), federated.Cast("bf16")
    ),
}


async def compression(options: Options) -> list[Found]:
    """Bytes of a round, and what they cost in seconds and in accuracy."""
    columns = ["to it, kB", "from it, kB", "both, none = 1", "a round, ms", "accuracy, %"]
    found = Found("2 workers, small MLP, each compression: of a worker and a round", columns)
    rounds, whole = options.rounds or 20, math.nan
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = [write_separable(folder / f"{at}.npz", 640, at) for at in range(2)]
        test = write_separable(folder / "test.npz", 1000, 2)
        each = [["--dataset", f"rows={path}", "--dataset", f"test={test}"] for path in data]
        urls = [told["url"] for told in started(stack, 2, each=each)]
        for name, scheme in _COMPRESSIONS.items():
            torch.manual_seed(0)
            history = await federated.fit(
                *(mlp(), [partial(wsfed.connect, url) for url in urls], "rows"),
                *(F.cross_entropy, _SGD),
                rounds=rounds + 1,
                validation="test",
                metrics={"accuracy": _accuracy},
                evaluate_every=rounds + 1,
                compression=scheme,
            )
            sites = [site for each in history[1:] for site in each.sites]
            up, down = (
                statistics.mean(getattr(site, way) for site in sites) / 1e3
                for way in ("bytes_up", "bytes_down")
            )
            whole = whole if scheme is not None else up + down
            accuracy = history[-1].metrics["accuracy"] * 100
            seconds = _ms(history.series("seconds")[1:])
            found.add(name, up, down, (up + down) / whole, seconds, accuracy)
    found.notes.append("the first round, which records and sends plans, is not counted")
    return [found]


def _accuracy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == labels).float().mean()


# --- many virtual clients -------------------------------------------------------------------------


async def virtual(options: Options) -> list[Found]:
    """Many clients in one process."""
    clients = options.clients
    told = told_by(_PROBES, "virtual", str(clients), str(options.rounds or 5))
    found = Found(f"{clients:,} virtual clients, a tiny model, one process", ["wsfed"])
    found.add("a round, s (median)", statistics.median(told["rounds"]), target=1.5)
    found.add("the first round, s", told["first"])
    found.add("set-up, s", told["set-up"])
    found.add("memory of the process at most, MB", told["peak"] / MB, target=500.0)
    found.add("of which before the data were made, MB", told["start"] / MB)
    if told["sites"] != clients:
        raise AssertionError(f"{told['sites']} sites took part")
    return [found]


# --- a cold start ---------------------------------------------------------------------------------


async def cold(options: Options) -> list[Found]:
    """From the start of a program to the end of its first round."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = write_rows(folder / "rows.npz", 64, 0)
        urls = [each["url"] for each in started(stack, 2, "--dataset", f"rows={data}")]
        told = [told_by("benchmarks.federated_cold", str(time.time()), *urls) for _ in range(3)]
    found = Found("a program's start, 2 running workers, s", ["first", "second", "third"])
    found.add("start to the end of the first round", *(t["to the first round"] for t in told))
    found.add("import torch", *(t["import torch"] for t in told))
    beyond = [t["to the first round"] - t["import torch"] for t in told]
    found.add("the rest", *beyond, target=3.0)
    found.add("of which the first round", *(t["first round"] for t in told))
    found.add("the second round", *(t["second round"] for t in told))
    found.notes.append("the workers are new only to the first program")
    return [found]


# --- a worker that is lost ------------------------------------------------------------------------


async def lost(options: Options) -> list[Found]:
    """A worker that is killed in the middle of a round."""
    found = Found(
        "3 workers, one killed in a round, s",
        ["deadline", "normal round", "that round", "it was", "the next", "the last"],
    )
    for deadline in (2.0, None):
        found.add("with a deadline" if deadline else "without", *await _lost(deadline))
    return [found]


class _Kill(federated.Callback):
    """Kills a process when its site has done a few steps of a round."""

    def __init__(self, site: str, process: int, number: int, batch: int) -> None:
        self._site, self._process, self._number, self._batch = site, process, number, batch
        self._now = 0
        self._batches = 0

    def round_begins(self, number: int, sites: list[str]) -> None:
        """Counts."""
        self._now, self._batches = number, 0

    def batch_done(self, site: str, progress: Any) -> None:
        """Kills, once."""
        if self._now != self._number or site != self._site:
            return
        self._batches += 1
        if self._batches == self._batch:
            os.kill(self._process, signal.SIGKILL)


async def _lost(deadline: float | None) -> list[float | str]:
    """The deadline, a normal round, the one with the loss, what it is called, and those after."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = write_rows(folder / "rows.npz", 64 * 50, 0)
        told = started(stack, 3, "--dataset", f"rows={data}")
        openers = [partial(wsfed.connect, each["url"]) for each in told]
        train = partial(federated.fit, mlp(), openers, "rows", F.cross_entropy, _SGD)
        await train(rounds=1)  # the first training of a worker loads torch's compiler: no deadline
        history = await train(
            rounds=8,
            deadline=deadline,
            min_workers=2,
            callbacks=[_Kill("worker-2", told[2]["pid"], number=5, batch=20)],
        )
    seconds = history.series("seconds")
    outcome = {site.site: site.outcome for site in history[4].sites}["worker-2"]
    told_as = outcome if outcome in ("late", "used") else "lost"  # else it says why, at length
    normal = statistics.median(seconds[1:4])
    return [deadline or "none", normal, seconds[4], told_as, seconds[5], seconds[-1]]


# --- the anchor -----------------------------------------------------------------------------------


async def anchor(options: Options) -> list[Found]:
    """Rounds to an accuracy, beside the reference's."""
    columns = ["85 %", "90 %", "92 %", "94 %", "best, %", "s a round"]
    found = Found("MNIST, 100 sites, rounds to a test accuracy", columns)
    try:
        path = options.mnist or anchors.fetch(options.out / "federated-cache")
    except RuntimeError as error:
        found.notes.append(f"skipped: {error}")
        return [found]
    rows, test = anchors.load(path)
    for name in options.anchor:
        setting = anchors.SETTINGS[name]
        found.add(f"{setting.title}: reference", *_cells(setting.reference))
        for network in options.networks:
            history = await _anchored(setting, network, rows, test, options)
            accuracies = history.series("accuracy")
            reached = anchors.rounds_to(accuracies, list(setting.reference))
            cells = _cells({goal: [at or f"> {len(history)}"] for goal, at in reached.items()})
            took = statistics.median(history.series("seconds"))
            found.add(f"- {network}", *cells, max(accuracies), took)
    found.notes.append(f"seed {options.seed}; the reference's are 0, 1, 2 (0 for FedSGD)")
    return [found]


async def _anchored(
    setting: anchors.Setting,
    network: str,
    rows: anchors.Digits,
    test: anchors.Digits,
    options: Options,
) -> federated.History:
    rounds = min(options.rounds or setting.most, setting.most)
    sites = anchors.parts(setting, rows, anchors.SITES, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        async with anchors.NETWORKS[network](sites, Path(folder)) as opened:
            return await anchors.train(setting, opened, test, rounds=rounds, seed=options.seed)


def _cells(rounds: Mapping[int, Sequence[int | str]]) -> list[str]:
    return ["/".join(map(str, rounds.get(goal, ()))) for goal in (85, 90, 92, 94)]


# --- Flower ---------------------------------------------------------------------------------------


async def flower(options: Options) -> list[Found]:
    """The same job in Flower, of its own virtual environment."""
    rounds = options.rounds or 5
    found = Found("2 clients, small MLP, s a round", ["median", "whole run", "rounds"])
    try:
        told = federated_flower.measure(options.out / "federated-cache", rounds)
    except RuntimeError as error:
        found.notes.append(f"skipped: {error}")
        return [found]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = [write_rows(folder / f"{at}.npz", 64, at) for at in range(2)]
        workers = started(stack, 2, each=[["--dataset", f"rows={path}"] for path in data])
        begun = time.perf_counter()
        openers = [partial(wsfed.connect, each["url"]) for each in workers]
        history = await federated.fit(
            mlp(), openers, "rows", F.cross_entropy, _SGD, rounds=rounds + 1
        )
        took = time.perf_counter() - begun
    ours = history.series("seconds")[1:]
    found.add("wsfed, 2 worker processes", statistics.median(ours), took, len(ours))
    for how, each in told.runs.items():
        found.add(f"Flower {told.version}, {how}", each.median, each.whole, each.rounds)
    found.notes.extend(told.notes)
    return [found]


#: By the word that picks one, in the order in which they run.
CASES: Final[Mapping[str, Callable[[Options], Awaitable[list[Found]]]]] = {
    "overhead": overhead,
    "large": large,
    "compression": compression,
    "virtual": virtual,
    "cold": cold,
    "lost": lost,
    "anchor": anchor,
    "flower": flower,
}
