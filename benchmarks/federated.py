"""Print tables of what federated training takes, beside a bare loop over websockets in one run.

    python -m benchmarks.federated                     all cases but Flower's
    python -m benchmarks.federated --only overhead     one case; may be given several times
    python -m benchmarks.federated --with-flower       Flower, too, installed beside
    python -m benchmarks.federated --out FOLDER        where federated.json goes (runs/)
    python -m benchmarks.federated --page FILE         writes the tables as a page, too

Cases: overhead, large, compression, virtual, cold, lost, anchor, flower. The anchor takes long:
pick settings (--anchor iid-5), networks (--network virtual), and bound its rounds (--rounds 20).
Only ratios carry over to other machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.federated_anchor import NETWORKS, SETTINGS
from benchmarks.federated_cases import CASES, Found, Row
from benchmarks.federated_tasks import CHECKOUT
from benchmarks.machine import machine

__all__ = ["main", "measure", "page"]


async def measure(options: argparse.Namespace, console: Console) -> dict[str, list[Found]]:
    """The cases that are wanted, each shown as soon as it is there."""
    results: dict[str, list[Found]] = {}
    for name in options.only:
        with console.status(name):
            results[name] = await CASES[name](options)
        for found in results[name]:
            show(found, console)
        save(results, options)
    return results


def save(results: Mapping[str, Sequence[Found]], options: argparse.Namespace) -> None:
    """Write what there is so far; a case that was measured before stays, if it was left out now."""
    path = options.out / "federated.json"
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    told["machine"] = machine()
    told |= {name: [found.plain() for found in each] for name, each in results.items()}
    path.write_text(json.dumps(told, indent=2) + "\n")


# --- showing --------------------------------------------------------------------------------------


def show(found: Found, console: Console) -> None:
    """A table."""
    table = Table(title=found.title, caption="; ".join(found.notes) or None)
    table.add_column("")
    for name in found.columns:
        table.add_column(name, justify="right")
    table.add_column("target", justify="right")
    for row in found.rows:
        table.add_row(row.what, *_figures(row, found), _target(row))
    console.print(table)


def page(results: Mapping[str, Sequence[Found]]) -> str:
    """The tables as Markdown."""
    lines = [PAGE + ", ".join(f"{name} {told}" for name, told in machine().items()) + "."]
    for found in (found for each in results.values() for found in each):
        lines += ["", f"## {found.title}", ""]
        lines += [f"| | {' | '.join(found.columns)} | target |"]
        lines += ["|---" * (2 + len(found.columns)) + "|"]
        for row in found.rows:
            lines.append(f"| {row.what} | {' | '.join(_figures(row, found))} | {_target(row)} |")
        lines += [line for note in found.notes for line in ("", f"{note[0].upper()}{note[1:]}.")]
    return "\n".join(lines) + "\n"


PAGE: Final = """\
# Federated training: what it takes

Measured by `python -m benchmarks.federated`: the systems take turns in one run. Worker processes of
one thread, loopback. **Only the ratios carry over** to other machines; no test asserts a time.

"""


def _figures(row: Row, found: Found) -> list[str]:
    told = [number(figure) for figure in row.figures]
    return told + [""] * (len(found.columns) - len(told))


def _target(row: Row) -> str:
    return "" if row.target is None else f"≤ {row.target:g}"


def number(figure: float | str) -> str:
    """A figure with as many digits as mean something."""
    if isinstance(figure, str):
        return figure
    if math.isnan(figure):
        return "-"
    if isinstance(figure, int) or abs(figure) >= 100:
        return f"{figure:,.0f}"
    return f"{figure:,.3f}" if abs(figure) < 1 else f"{figure:,.2f}"


def options_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the program is told."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, action="extend", metavar="CASE")
    parser.add_argument("--rounds", type=int, help="of each case, in place of its own number")
    parser.add_argument("--with-flower", action="store_true", help="installs it beside, once")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "runs")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 10], help="of overhead")
    parser.add_argument("--millions", type=int, default=25, help="parameters of the large model")
    parser.add_argument("--clients", type=int, default=1000, help="virtual ones")
    parser.add_argument("--mnist", type=Path, metavar="FILE", help=".npz of images and labels")
    parser.add_argument("--anchor", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--network", dest="networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)
    )
    parser.add_argument("--seed", type=int, default=0, help="of the anchor")
    options = parser.parse_args(argv)
    options.only = options.only or [name for name in CASES if name != "flower"]
    if options.with_flower and "flower" not in options.only:
        options.only.append("flower")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    options = options_of(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    results = asyncio.run(measure(options, console))
    if options.page:
        options.page.write_text(page(results), encoding="utf-8")
    console.print(f"{options.out}/federated.json; {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
