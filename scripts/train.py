"""Train one model over the workers that ``start_workers.py`` started.

    python scripts/train.py --workers-json runs/workers.json --schedule concurrent

``sequential``: the model travels from worker to worker and is trained where the rows are.
``concurrent``: a copy goes to every worker at once; the results are averaged, weighted by rows
(federated averaging). The rows never travel.

Writes a model (safetensors), the metrics of each round (CSV) and a plot (PNG) to --out.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import csv
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

import digits
import wsfed
from wsfed.federated.averaging import weighted_mean

matplotlib.use("Agg")

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Round:
    """One round: what it cost and what came of it. Times in seconds, traffic in bytes."""

    round: int
    loss: float
    #: On held-out rows; ``None`` where there are none.
    accuracy: float | None
    seconds: float
    #: From the first command to the last loss, per worker.
    worker_seconds: tuple[float, ...]
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True)
class Site:
    """A worker, its data set, and the batches of an epoch."""

    worker: wsfed.Worker
    dataset: wsfed.RemoteDataset
    loader: Any


def build(name: str, seed: int) -> nn.Module:
    """The model: the same one for the same seed."""
    torch.manual_seed(seed)
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


def optimizer_of(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """torch's own; it follows the parameters to whatever worker they are on."""
    return torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum)


# --- training where the rows are -----------------------------------------------------------------


async def train_at(
    site: Site,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, ...]],
) -> tuple[list[float], float]:
    """Send the model, train it there, bring it home. Gives the losses and the seconds."""
    begun = time.perf_counter()
    site.worker.send(model)
    losses: list[Awaitable[torch.Tensor]] = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().get())
        await asyncio.sleep(0)  # let what is queued leave, and the other workers have a turn
    await wsfed.get(model, grads=False)
    return [float(await loss) for loss in losses], time.perf_counter() - begun


def epochs(site: Site, options: argparse.Namespace) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches of the local epochs of a round."""
    for _ in range(options.epochs):
        yield from site.loader


async def sequential(
    model: nn.Module, sites: Sequence[Site], options: argparse.Namespace
) -> AsyncIterator[tuple[float, tuple[float, ...]]]:
    """Rounds in which the model travels from worker to worker."""
    optimizer = optimizer_of(model, options)
    for _ in range(options.rounds):
        losses, seconds = [list[float]() for _ in sites], [0.0 for _ in sites]
        left = {number: epochs(site, options) for number, site in enumerate(sites)}
        while left:
            for number in tuple(left):
                batches = list(itertools.islice(left[number], options.visit or None))
                if batches:
                    told, took = await train_at(sites[number], model, optimizer, batches)
                    losses[number] += told
                    seconds[number] += took
                else:
                    del left[number]
        yield combine(list(zip(losses, seconds, strict=True)), sites)


async def concurrent(
    model: nn.Module, sites: Sequence[Site], options: argparse.Namespace
) -> AsyncIterator[tuple[float, tuple[float, ...]]]:
    """Rounds in which every worker trains a copy, and the copies are averaged."""
    for _ in range(options.rounds):
        copies = [copy.deepcopy(model) for _ in sites]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    train_at(site, each, optimizer_of(each, options), epochs(site, options))
                )
                for site, each in zip(sites, copies, strict=True)
            ]
        rows = [len(site.dataset) for site in sites]
        model.load_state_dict(weighted_mean([each.state_dict() for each in copies], rows))
        yield combine([task.result() for task in tasks], sites)


def combine(
    results: Sequence[tuple[list[float], float]], sites: Sequence[Site]
) -> tuple[float, tuple[float, ...]]:
    """Mean loss, weighted by rows, and the seconds of each worker."""
    rows = [len(site.dataset) for site in sites]
    means = [sum(losses) / len(losses) for losses, _ in results]
    loss = sum(mean * n for mean, n in zip(means, rows, strict=True)) / sum(rows)
    return loss, tuple(seconds for _, seconds in results)


def centralised(rows: digits.Rows, options: argparse.Namespace) -> nn.Module:
    """The same model, trained on all rows in this process."""
    model = build(options.model, options.seed)
    optimizer = optimizer_of(model, options)
    images, labels = torch.from_numpy(rows.images), torch.from_numpy(rows.labels)
    for epoch in range(options.rounds * options.epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        for index in order.split(options.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy_of(model: nn.Module, rows: digits.Rows | None) -> float | None:
    """The share of held-out rows that the model gets right."""
    if rows is None:
        return None
    model.eval()
    guesses = model(torch.from_numpy(rows.images)).argmax(1)
    model.train()
    return float((guesses == torch.from_numpy(rows.labels)).float().mean())


# --- the program ---------------------------------------------------------------------------------


class TrainingFailed(Exception):
    """Training came to an early end; the text says why."""


async def run(
    started: dict[str, Any],
    model: nn.Module,
    history: list[Round],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Connect to the workers and train over them; rounds are added to ``history``."""
    schedule = {"sequential": sequential, "concurrent": concurrent}[options.schedule]
    async with AsyncExitStack() as stack:
        sites = [
            await open_site(each, number, started["dataset"], options, stack)
            for number, each in enumerate(started["workers"])
        ]
        shown = ", ".join(f"{site.worker.id} ({len(site.dataset)} rows)" for site in sites)
        console.print(f"{options.schedule} training of the {options.model} over {shown}")
        for site in sites:
            check_rows(site)
        try:
            rounds = schedule(model, sites, options)
            await follow(rounds, model, sites, history, options, console)
        except* wsfed.WsfedError as group:
            raise TrainingFailed(await why_failed(sites, group.exceptions[0])) from None


def check_rows(site: Site) -> None:
    """Whether the models here can be trained on these rows."""
    (_, images), (_, labels), *_ = [*site.dataset.fields.items(), *[("", None)] * 2]
    if images is None or labels is None:
        raise TrainingFailed(f"{site.dataset!r} has no two fields, images and labels")
    if images.shape[1:] != (1, 8, 8) or labels.shape[1:] or labels.dtype is not torch.int64:
        raise TrainingFailed(
            f"{site.dataset!r}: images have to be of 1 x 8 x 8 and labels whole numbers, "
            f"not {list(images.shape[1:])} and {labels.dtype}{list(labels.shape[1:])}"
        )


async def why_failed(sites: Sequence[Site], first: BaseException) -> str:
    """The workers that were lost; one that was told to end because of another is not the cause."""
    asked = [site.worker.flush() for site in sites if not site.worker.closed]
    errors = [first, *await asyncio.gather(*asked, return_exceptions=True)]
    lost = [each for each in errors if isinstance(each, wsfed.ConnectionLost)]
    return "\n".join(dict.fromkeys(str(each) for each in lost or [first]))


async def open_site(
    told: dict[str, Any],
    number: int,
    dataset: str,
    options: argparse.Namespace,
    stack: AsyncExitStack,
) -> Site:
    """Connect to a worker and look up its data set."""
    worker = await stack.enter_async_context(wsfed.connect(told["url"]))
    data = await worker.dataset(dataset)
    seed = options.seed + 1000 * number
    return Site(worker, data, data.loader(options.batch_size, shuffle=True, seed=seed))


async def follow(
    rounds: AsyncIterator[tuple[float, tuple[float, ...]]],
    model: nn.Module,
    sites: Sequence[Site],
    history: list[Round],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Go through the rounds with a progress bar."""
    columns = (
        TextColumn("round {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rounds", total=options.rounds, state="")
        begun, before = time.perf_counter(), traffic(sites)
        async for loss, seconds in rounds:
            now, after = time.perf_counter(), traffic(sites)
            this = Round(
                len(history) + 1,
                loss,
                accuracy_of(model, options.test),
                now - begun,
                seconds,
                after[0] - before[0],
                after[1] - before[1],
            )
            history.append(this)
            state = (
                f"loss {loss:.4f}  accuracy {shown(this.accuracy)}  "
                f"{(this.bytes_up + this.bytes_down) / 1e6:.2f} MB a round"
            )
            progress.update(task, advance=1, state=state)
            begun, before = time.perf_counter(), after


def shown(accuracy: float | None) -> str:
    """An accuracy as text."""
    return "-" if accuracy is None else f"{accuracy:.4f}"


def traffic(sites: Sequence[Site]) -> tuple[int, int]:
    """Bytes to and from all workers so far."""
    pairs = [site.worker.traffic for site in sites]
    return sum(up for up, _ in pairs), sum(down for _, down in pairs)


def report(
    history: Sequence[Round],
    baseline: float | None,
    options: argparse.Namespace,
    console: Console,
) -> None:
    """The result, beside centralised training where there was any."""
    last, seconds = history[-1], [each.seconds for each in history]
    table = Table(title="held-out rows" if options.test else "no held-out rows (give --test FILE)")
    for column in ("training", "accuracy", "seconds a round"):
        table.add_column(column)
    table.add_row(options.schedule, shown(last.accuracy), f"{np.median(seconds):.3f}")
    if baseline is not None:
        table.add_row("centralised", shown(baseline), "")
    console.print(table)
    slowest = float(np.median([each.seconds / max(each.worker_seconds) for each in history]))
    whole = float(np.median([each.seconds / sum(each.worker_seconds) for each in history]))
    console.print(
        f"a round took {slowest:.2f} × the time of its slowest worker, "
        f"{whole:.2f} × what all its workers took together"
    )


def save(history: Sequence[Round], options: argparse.Namespace, console: Console) -> None:
    """Metrics and plot."""
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / options.schedule
    with open(f"{stem}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Round)])
        for each in history:
            row = asdict(each)
            row["worker_seconds"] = " ".join(f"{s:.6f}" for s in each.worker_seconds)
            writer.writerow(row.values())
    plot(history, options, Path(f"{stem}.png"))
    for suffix, what in (("csv", "metrics"), ("png", "plot")):
        console.print(f"{what}: {stem}.{suffix}", soft_wrap=True)


def plot(history: Sequence[Round], options: argparse.Namespace, path: Path) -> None:
    """Loss and accuracy over the rounds."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    numbers = [each.round for each in history]
    left.plot(numbers, [each.loss for each in history], marker="o", markersize=3)
    left.set(xlabel="round", ylabel="training loss", yscale="log")
    right.plot(
        numbers,
        [np.nan if each.accuracy is None else each.accuracy for each in history],
        marker="o",
        markersize=3,
        color="C2",
    )
    right.axhline(0.95, color="grey", linestyle=":", label="0.95")
    right.set(xlabel="round", ylabel="accuracy on held-out rows", ylim=(0, 1.02))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{options.schedule} training of the {options.model}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers-json", type=Path, required=True, help="what start_workers.py wrote")
    add("--schedule", choices=("sequential", "concurrent"), default="concurrent")
    add("--model", choices=("cnn", "mlp"), default="cnn")
    add("--rounds", type=int, default=10)
    add("--epochs", type=int, default=1, help="local epochs a round")
    add(
        "--visit",
        type=int,
        metavar="BATCHES",
        help="sequential: batches before the model travels on, 0 for all of the local epochs "
        "(default 0; 1 where the digits are split by label, or it would forget the others)",
    )
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=0.05)
    add("--momentum", type=float, default=0.9)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=CHECKOUT / "runs")
    add("--test", type=Path, metavar="FILE", help="held-out rows (.npz with images and labels)")
    add("--no-baseline", action="store_true", help="no centralised training to compare with")
    options = parser.parse_args(argv)
    for name in ("rounds", "epochs", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} has to be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    options, console = parse(argv), Console()
    history: list[Round] = []
    try:
        started = read_workers(options)
        model = build(options.model, options.seed)
        asyncio.run(run(started, model, history, options, console))
    except (TrainingFailed, wsfed.WsfedError) as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        return give_up(1, history, options, console)
    except KeyboardInterrupt:
        console.print("[red]interrupted[/]")
        return give_up(130, history, options, console)
    finish(started, model, history, options, console)
    return 0


def read_workers(options: argparse.Namespace) -> dict[str, Any]:
    """What start_workers.py wrote; completes the options that depend on it."""
    file = options.workers_json
    try:
        started: dict[str, Any] = json.loads(file.read_text())
        [each["url"] for each in started["workers"]], started["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingFailed(f"{file}: {error!r} (start_workers.py writes it)") from None
    if options.visit is None:
        options.visit = 1 if started.get("split") == "label" else 0
    test = options.test or started.get("test")
    try:
        options.test = digits.Rows.load(Path(test)) if test else None
    except (OSError, ValueError, KeyError) as error:
        raise TrainingFailed(f"{test}: {error}") from None
    return started


def give_up(
    code: int, history: Sequence[Round], options: argparse.Namespace, console: Console
) -> int:
    """Save what there is of metrics."""
    if history:
        console.print(f"{len(history)} rounds were finished")
        save(history, options, console)
    return code


def finish(
    started: dict[str, Any],
    model: nn.Module,
    history: Sequence[Round],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Compare with centralised training, where its rows are here, and save."""
    baseline = None
    if started.get("split") and not options.no_baseline:
        train, _ = digits.load()
        baseline = accuracy_of(centralised(train, options), options.test)
    report(history, baseline, options, console)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{options.schedule}.safetensors"
    save_file(model.state_dict(), file)
    console.print(f"model: {file}", soft_wrap=True)
    save(history, options, console)


if __name__ == "__main__":
    sys.exit(main())
