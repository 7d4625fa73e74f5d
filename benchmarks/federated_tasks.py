"""What is trained in the cases of :mod:`benchmarks.federated`, and what it takes of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import nn

from wsfed import federated
from wsfed.testing import worker_process

__all__ = [
    *("CHECKOUT", "MB", "Large", "Moving", "all_entered", "cpu_seconds", "large_objective", "mlp"),
    *("peak_memory", "program", "started", "told_by", "write_rows", "write_separable"),
]

CHECKOUT: Final = Path(__file__).resolve().parent.parent
#: What networks and memory are counted in here, as in the figures of other systems.
MB: Final = 10**6

_T = TypeVar("_T")

# --- models and rows ------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """McMahan's 2NN: 784-200-200-10, 199,210 parameters."""
    return nn.Sequential(
        *(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    )


def write_rows(path: Path, rows: int, seed: int, features: int = 784) -> Path:
    """Write a data set of random rows with ten labels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, features), dtype=np.float32)
    np.savez(path, x=x, y=rng.integers(0, 10, rows))
    return path


def write_separable(path: Path, rows: int, seed: int, features: int = 784) -> Path:
    """Write random rows around ten centres, the same ones for every seed."""
    centres = np.random.default_rng(0).standard_normal((10, features), dtype=np.float32)
    rng = np.random.default_rng((1, seed))
    y = rng.integers(0, 10, rows)
    noise = rng.standard_normal((rows, features), dtype=np.float32)
    np.savez(path, x=0.15 * centres[y] + noise, y=y)
    return path


class Large(nn.Module):
    """Tensors of a million parameters each, and one weight, which is all that is trained."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))
        self.rest = nn.ParameterList(torch.rand(1000, 1000) for _ in range(millions))


def large_objective(model: Large, x: torch.Tensor) -> torch.Tensor:
    """Touches one weight."""
    return (model.one * x).mean()


class Moving(federated.FedAvg):
    """One number of each tensor is another in each round: what has not changed is not sent."""

    def step(
        self, state: Mapping[str, torch.Tensor], memory: Any, mean: Mapping[str, torch.Tensor]
    ) -> tuple[Mapping[str, torch.Tensor], Any]:
        """See :class:`~wsfed.federated.MeanStrategy`."""
        for value in mean.values():
            value.view(-1)[0] += 1
        return mean, memory


# --- processes ------------------------------------------------------------------------------------


def started(
    stack: ExitStack, count: int, *options: str, each: Sequence[Sequence[str]] = ()
) -> list[dict[str, Any]]:
    """Worker processes of one thread, several at a time.

    Args:
        stack: ends them.
        count: how many.
        options: of all of them.
        each: options of each of them.
    """
    own = each or [()] * count
    processes = [
        worker_process("--id", f"worker-{at}", "--threads", "1", *options, *own[at])
        for at in range(count)
    ]
    return all_entered(stack, processes)


def all_entered(stack: ExitStack, contexts: Sequence[AbstractContextManager[_T]]) -> list[_T]:
    """Enter all at once, in threads; what was entered is left with the stack, whatever fails."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(stack.enter_context, contexts))


@contextmanager
def program(module: str, *options: str) -> Iterator[str]:
    """A process that goes on; gives its first line."""
    command = [sys.executable, "-m", module, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{module} did not start (exit code {process.wait()})")
            yield line
        finally:
            process.terminate()
            process.wait()


def told_by(module: str, *options: str, timeout: float = 900) -> dict[str, Any]:
    """What a program of its own process tells as JSON in its last line."""
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT, timeout=timeout, check=True
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


# --- what it takes --------------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes that this process has had in memory at most.

    ``getrusage`` counts what the parent had before exec, too (Linux copies it), so it is asked
    only where there is no ``/proc``.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def cpu_seconds(process: int) -> float:
    """CPU that a process has used; nan where that is not told."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))
