"""Runs torch's own test databases on a worker process and writes docs/coverage.md.

    python scripts/torch_coverage.py            every sample, some minutes
    python scripts/torch_coverage.py --most 3   at most three of an entry; nothing is written

Exit code 1 where a sample fails.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import track

from wsfed import sync
from wsfed.testing import coverage, worker_process
from wsfed.testing.coverage import DTYPES, KINDS, Outcome

TARGET: Final = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"

HEAD: Final = """\
# Coverage

torch's own test databases, run through pointers on a worker process and compared with local torch:
results (dtype, shape, strides, `requires_grad`, `is_leaf`), what is written into arguments, also
through views, and gradients; bit for bit, or within torch's tolerances where local torch does not
repeat itself. Written by `scripts/test --all` (`wsfed.testing.coverage` has the runner).

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, help="samples of an entry (default all)")
    most: int | None = parser.parse_args(argv).most
    console = Console(stderr=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begun = time.monotonic()
    # Quiet: these samples make many of torch's warnings.
    with (
        worker_process("--threads", "1", quiet=True) as started,
        sync.connect(started["url"]) as connected,
    ):
        runs = {
            "op_db": coverage.operators(connected, most=most, dtypes=DTYPES),
            "module_db": coverage.modules(connected, most=most),
            "optim_db": coverage.optimizers(connected),
        }
        outcomes = {
            name: list(track(run, description=f"{name:9}", console=console, transient=True))
            for name, run in runs.items()
        }
    failed = [each for group in outcomes.values() for each in group if each.failed]
    for each in failed:
        console.print(str(each), soft_wrap=True, markup=False)
    for line in summary(outcomes):
        console.print(line, markup=False)
    console.print(f"{time.monotonic() - begun:.0f} s")
    if most is None:
        TARGET.write_text(text(outcomes), encoding="utf-8")
        console.print(f"written: {TARGET}", soft_wrap=True)
    return 1 if failed else 0


def summary(outcomes: dict[str, list[Outcome]]) -> Iterator[str]:
    """A line of Markdown's for each database."""
    yield f"| database | entries | run | all samples equal | {' | '.join(KINDS)} |"
    yield "|---" * (4 + len(KINDS)) + "|"
    for name, group in outcomes.items():
        ran = [each for each in group if not each.excluded]
        equal = sum(not each.failed for each in ran)
        counts = [fraction(ran, kind) for kind in KINDS]
        yield f"| {name} | {len(group)} | {len(ran)} | {equal} | {' | '.join(counts)} |"


def fraction(ran: list[Outcome], kind: str) -> str:
    """Samples that passed, of those that were compared."""
    passed = sum(each.passed.get(kind, 0) for each in ran)
    failed = sum(len(each.failed.get(kind, ())) for each in ran)
    return f"{passed:,} / {passed + failed:,}" if passed + failed else ""


def text(outcomes: dict[str, list[Outcome]]) -> str:
    """The page."""
    lines = [HEAD + f"torch {torch.__version__}, {platform.machine()}, CPU.\n", *summary(outcomes)]
    lines += ["", "Operators are run with " + ", ".join(f"`{dtype}`" for dtype in DTYPES) + "."]
    everything = [each for group in outcomes.values() for each in group]
    failed = [each for each in everything if each.failed]
    lines += ["", "## What differs", "", *([f"- {each}" for each in failed] or ["Nothing."])]
    lines += ["", "## What is not run", "", "| reason | entries |", "|---|---|"]
    reasons: dict[str, list[str]] = {}
    for each in everything:
        if each.excluded:
            reasons.setdefault(each.excluded, []).append(f"`{each.name}`")
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in reasons.items()]
    for name, group in outcomes.items():
        kinds = [kind for kind in KINDS if any(kind in each.passed for each in group)]
        lines += ["", f"## {name}", "", f"| entry | {' | '.join(kinds)} |"]
        lines += ["|---" * (1 + len(kinds)) + "|"]
        lines += [
            f"| {each.name} | {' | '.join(fraction([each], kind) for kind in kinds)} |"
            for each in group
            if not each.excluded
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
