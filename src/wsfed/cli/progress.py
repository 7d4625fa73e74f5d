"""What a training shows while it goes on: a bar, lines of a file, a TensorBoard."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from wsfed.federated.callbacks import Callback
from wsfed.federated.history import History, Round

__all__ = ["Bar", "Boards", "Lines"]


class Bar(Callback):
    """Rounds, sites that have finished, the last loss, traffic, and the time that is left.

    Args:
        console: of rich.
        rounds: all of them.
    """

    def __init__(self, console: Any, rounds: int) -> None:
        self._progress = Progress(
            TextColumn("round {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            # The rest is cut off where the window is narrow.
            TextColumn(
                "{task.fields[state]}",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("rounds", total=rounds, state="")
        self._told = ""
        self._at: dict[str, tuple[int, int]] = {}
        self._sites = 0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def round_begins(self, number: int, sites: list[str]) -> None:
        """A new round."""
        self._at.clear()
        self._sites = len(sites)
        self._progress.update(self._task, completed=number - 1)
        self._show()

    def batch_done(self, site: str, progress: Any) -> None:
        """Count it."""
        self._at[site] = (progress.done, progress.total)
        self._show()

    def round_ends(self, round: Round, history: History) -> None:
        """Show its numbers."""
        numbers = {"loss": round.loss, **round.metrics}
        told = [f"{name} {value:.4f}" for name, value in numbers.items()]
        self._told = "  ".join([*told, decimal(round.bytes)])
        self._progress.update(self._task, completed=round.number)
        self._show()

    def _show(self) -> None:
        done = sum(at == total for at, total in self._at.values())
        self._progress.update(self._task, state=f"{done}/{self._sites} sites  {self._told}".strip())


class Lines(Callback):
    """``history.csv``, written anew after each round, so that it can be watched.

    Args:
        folder: where it goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def round_ends(self, round: Round, history: History) -> None:
        """Write it."""
        await asyncio.to_thread(self._write, history)

    def _write(self, history: History) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        history.to_csv(self._folder / "history.csv")


class Boards(Callback):
    """Numbers of each round for TensorBoard.

    Args:
        folder: of the event files.

    Raises:
        ImportError: ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def __enter__(self) -> Boards:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    async def round_ends(self, round: Round, history: History) -> None:
        """Add its numbers."""
        await asyncio.to_thread(self._add, round)

    def _add(self, round: Round) -> None:
        numbers = {"loss": round.loss, "seconds": round.seconds, "bytes": round.bytes}
        for name, value in {**numbers, **round.metrics}.items():
            self._writer.add_scalar(name, value, round.number)
        self._writer.flush()
