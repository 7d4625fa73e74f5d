"""What training was: each round, and what each site did in it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

__all__ = ["History", "Round", "SiteRound"]


@dataclass(frozen=True, slots=True)
class SiteRound:
    """What one site did in one round.

    Attributes:
        site: who.
        outcome: ``"used"`` where its reply is part of the round; else why it is not: ``"late"``,
            ``"spare"`` (enough others had replied), or what was lost.
        rows: that it trained on.
        steps: of its optimizer.
        loss: mean of its training.
        metrics: of its evaluation.
        seconds: from the first command to the last byte.
        bytes_up: to the worker.
        bytes_down: from it.
        staleness: rounds between the model that it was given and this one.
    """

    site: str
    outcome: str = "used"
    rows: int = 0
    steps: int = 0
    loss: float = math.nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """One round.

    Attributes:
        number: from 1.
        loss: of training, the mean over the sites that were used, weighted by rows.
        metrics: of the new model: those of the sites' evaluation by their names (``loss`` is called
            ``eval_loss``), those of the central one by theirs.
        seconds: all of it.
        sites: what each did.
    """

    number: int
    loss: float
    metrics: Mapping[str, float]
    seconds: float
    sites: Sequence[SiteRound]

    @property
    def rows(self) -> int:
        """That were trained on, by the sites that were used."""
        return sum(each.rows for each in self.sites if each.outcome == "used")

    @property
    def bytes(self) -> int:
        """To and from all workers."""
        return sum(each.bytes_up + each.bytes_down for each in self.sites)

    @classmethod
    def of_plain(cls, told: Mapping[str, Any]) -> Round:
        """From what :func:`dataclasses.asdict` made of one."""
        sites = tuple(SiteRound(**each) for each in told["sites"])
        return cls(**{**told, "sites": sites})


class History(Sequence[Round]):
    """The rounds of a training, in order.

    Attributes:
        stopped: why it ended before its last round; ``""`` if it did not.
    """

    def __init__(self, rounds: Sequence[Round] = ()) -> None:
        self._rounds = list(rounds)
        self.stopped = ""

    def add(self, round: Round) -> None:
        """Add the next one."""
        self._rounds.append(round)

    @overload
    def __getitem__(self, index: int) -> Round: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Round]: ...
    def __getitem__(self, index: int | slice) -> Round | Sequence[Round]:
        return self._rounds[index]

    def __len__(self) -> int:
        return len(self._rounds)

    def __iter__(self) -> Iterator[Round]:
        return iter(self._rounds)

    def series(self, name: str) -> list[float]:
        """One number of every round: ``"loss"``, ``"seconds"``, ``"bytes"``, or a metric's name.

        Raises:
            KeyError: there is no such number.
        """
        if name in ("loss", "seconds", "bytes", "rows"):
            return [float(getattr(each, name)) for each in self]
        if name not in self.metric_names:
            raise KeyError(f"there is no {name!r}; there is {', '.join(self._columns())}")
        return [float(each.metrics.get(name, math.nan)) for each in self]

    @property
    def metric_names(self) -> list[str]:
        """Of all rounds, in the order in which they came up."""
        return list(dict.fromkeys(name for each in self for name in each.metrics))

    # --- for people ---

    def _columns(self) -> list[str]:
        return ["loss", *self.metric_names, "seconds", "bytes"]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows, most = [], max((each.bytes for each in self), default=0)
        unit, size = ("MB", 1e6) if most >= 1e5 else ("kB", 1e3)
        for each in self:
            used = sum(site.outcome == "used" for site in each.sites)
            numbers = [_shown(each.metrics.get(name)) for name in self.metric_names]
            rows.append(
                [
                    *(str(each.number), f"{used}/{len(each.sites)}", _shown(each.loss), *numbers),
                    *(f"{each.seconds:.2f}", f"{each.bytes / size:.2f}"),
                ]
            )
        return ["round", "sites", "loss", *self.metric_names, "seconds", unit], rows

    def __repr__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        head, rows = self._table()
        table = Table(title=f"{len(self)} rounds" + (self.stopped and f": {self.stopped}"))
        for name in head:
            table.add_column(name, justify="right")
        for row in _most(rows, ["…"] * len(head)):
            table.add_row(*row)
        console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()

    def _repr_html_(self) -> str:
        import html

        head, rows = self._table()
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in _most(rows, ["…"] * len(head))
        )
        return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each site of each round, with the numbers of the round repeated.

        Args:
            path: of the file; it is replaced.
        """
        per_site = [name for name in SiteRound.__dataclass_fields__ if name != "metrics"]
        own = list(dict.fromkeys(name for r in self for each in r.sites for name in each.metrics))
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            head = ["round", "round_loss", "round_seconds", *self.metric_names]
            writer.writerow([*head, *per_site, *(f"site_{name}" for name in own)])
            for each in self:
                shared: list[Any] = [each.number, each.loss, each.seconds]
                shared += [each.metrics.get(name, "") for name in self.metric_names]
                for site in each.sites:
                    values = asdict(site)
                    mine = [values[name] for name in per_site]
                    writer.writerow([*shared, *mine, *(site.metrics.get(name, "") for name in own)])

    def plot(self, path: str | Path | None = None) -> Any:
        """Loss and metrics over the rounds.

        Args:
            path: of an image to write, if one is wanted.

        Returns:
            The ``matplotlib`` figure.

        Raises:
            ImportError: ``matplotlib`` is not installed.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        names = [name for name in self.metric_names if not name.endswith("loss")]
        figure = Figure(figsize=(9 if names else 4.5, 3.6), layout="constrained")
        panels = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
        self._draw(panels[0], ["loss", *(n for n in self.metric_names if n.endswith("loss"))])
        panels[0].set(xlabel="round", ylabel="loss")
        if names:
            self._draw(panels[1], names)
            panels[1].set(xlabel="round", ylabel=", ".join(names) if len(names) < 3 else "metrics")
        for axes in panels:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _draw(self, axes: Any, names: Sequence[str]) -> None:
        for name in names:
            label = "training loss" if name == "loss" else name
            numbers = [each.number for each in self]
            axes.plot(numbers, self.series(name), marker="o", markersize=3, label=label)
        if len(names) > 1:
            axes.legend()


def _shown(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _most(rows: Sequence[Sequence[str]], gap: Sequence[str], most: int = 30) -> list[Sequence[str]]:
    """The first few and the last ones, where there are too many to look at."""
    return list(rows) if len(rows) <= most else [*rows[:5], gap, *rows[-(most - 6) :]]
