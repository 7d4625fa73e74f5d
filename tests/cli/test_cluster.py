"""``wsfed simulate --ray``: workers in processes of Ray's, and the same training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.cli.test_train import SIMULATED, change, folder, points, run
from wsfed import federated
from wsfed.cli.cluster import hosted

__all__ = ["folder"]

pytestmark = [
    pytest.mark.blocking,
    pytest.mark.processes,
    # Ray leaves its log files, sockets and daemons to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings(r"ignore:subprocess \d+ is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of two CPUs; gives its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """The model, and what is no measurement of the history."""
    lines = (folder / "history.csv").read_text().splitlines()
    names = lines[0].split(",")
    kept = [n for n, name in enumerate(names) if not re.search("seconds|bytes", name)]
    history = [[line.split(",")[n] for n in kept] for line in lines]
    return load_file(folder / "model.safetensors"), history


def assert_same(one: Path, other: Path) -> None:
    (model, history), (model_there, history_there) = outcome(one), outcome(other)
    assert history == history_there
    assert model.keys() == model_there.keys()
    for name, value in model.items():
        assert torch.equal(value, model_there[name]), name


# --- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_the_training_is_that_of_one_process(cluster: str, folder: Path, clients: int) -> None:
    text = SIMULATED.replace('"linear"', '"mlp"').replace("clients = 5", f"clients = {clients}")
    text += '\n[sampler]\nname = "Uniform"\nfraction = 0.6\n\n[output]\nfolder = "one"\n'
    file = folder / "train.toml"
    file.write_text(text)
    run("simulate", "-q", file)
    file.write_text(text.replace('"one"', '"ray"'))
    assert "3 rounds" in run("simulate", "-q", file, "--ray", cluster)
    assert_same(folder / "one", folder / "ray")
    assert ray.is_initialized()  # who has begun it ends it


def test_a_program_of_its_own_joins_a_cluster(cluster: str, folder: Path) -> None:
    run("simulate", "-q", folder / "train.toml")
    (folder / "runs").rename(folder / "one")
    file = folder / "train.toml"
    command = [sys.executable, "-m", "wsfed", "simulate", "-q", str(file)]
    done = subprocess.run(
        [*command, "--ray", cluster, "--ray-workers", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert_same(folder / "one", folder / "runs")


# --- what goes wrong ------------------------------------------------------------------------------


class Recorded:
    """A class of actors that notes which ones it makes."""

    def __init__(self, kind: Any, made: list[Any]) -> None:
        self._kind, self._made = kind, made

    def options(self, **options: Any) -> Recorded:
        return Recorded(self._kind.options(**options), self._made)

    def remote(self, *arguments: Any) -> Any:
        self._made.append(self._kind.remote(*arguments))
        return self._made[-1]


class Killing(federated.Callback):
    """Ends an actor before the second round."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def round_begins(self, number: int, sites: list[str]) -> None:
        if number == 2:
            ray.kill(self._actors[1])
            with pytest.raises(ray.exceptions.RayActorError):
                while True:
                    ray.get(self._actors[1].url.remote())


async def test_an_actor_that_dies_is_a_lost_worker(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors: list[Any] = []
    remote = ray.remote
    monkeypatch.setattr(ray, "remote", lambda kind: Recorded(remote(kind), actors))
    parts = [
        wsfed.Dataset(f"client-{n}", {k: torch.from_numpy(v) for k, v in points(16, n).items()})
        for n in range(4)
    ]
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(wsfed.TooFewSites) as caught:
        async with hosted(parts, cluster, 2) as openers:
            await federated.fit(
                model,
                openers,
                "client-*",
                F.cross_entropy,
                partial(torch.optim.SGD, lr=0.1),
                rounds=3,
                min_workers=4,
                callbacks=[Killing(actors)],
            )
    for lost in ("simulation/client-2", "simulation/client-3"):
        assert lost in str(caught.value)
    assert "client-0" not in str(caught.value)
    assert len(caught.value.history) == 1
    assert ray.is_initialized()


async def test_actors_are_only_for_who_has_their_token(cluster: str) -> None:
    rows = {k: torch.from_numpy(v) for k, v in points(8, 0).items()}
    async with hosted([wsfed.Dataset("client-0", rows)], cluster, None) as (opener,):
        assert isinstance(opener, partial)
        url, token = opener.args[0], opener.keywords["token"]
        assert url.startswith("ws://127.0.0.1:")
        with pytest.raises(wsfed.AuthenticationFailed):
            await wsfed.connect(url)
        async with wsfed.connect(url, token=token) as worker:
            assert list(worker.info["datasets"]) == ["client-0"]


def test_a_cluster_without_room_says_so(cluster: str, folder: Path) -> None:
    arguments = ["simulate", "-q", folder / "train.toml", "--ray", cluster, "--ray-workers", 3]
    assert "has 2 CPUs, and each worker needs one" in run(*arguments, code=1)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: "),
        ("ray://127.0.0.1:10001", "HOST:PORT of a cluster"),
        ("nowhere", "HOST:PORT of a cluster"),
        ("127.0.0.1:99999", "no Ray cluster at 127.0.0.1:99999: "),
    ],
)
def test_a_cluster_that_is_not_there_is_told(folder: Path, address: str, says: str) -> None:
    told = run("simulate", "-q", folder / "train.toml", "--ray", address, code=1)
    assert says in " ".join(told.split())
    assert "Traceback" not in told


def test_ray_is_optional(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    told = run("simulate", "-q", folder / "train.toml", "--ray", "local", code=1)
    assert "pip install 'wsfed[ray]'" in told
    assert "--ray-workers" in run("simulate", folder / "train.toml", "--ray-workers", 2, code=2)


# --- the end --------------------------------------------------------------------------------------


def marked(mark: str) -> list[str]:
    """Processes that were begun with this in their environment."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (each / "environ").read_bytes():
                found.append((each / "cmdline").read_text())
        except OSError:  # it has ended
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are read in /proc")
def test_ctrl_c_ends_the_training_and_the_ray_that_it_began(folder: Path) -> None:
    """The model sends the signal where it is evaluated: in this program, after a round."""
    (folder / "model.py").write_text(
        "import os, signal\nfrom torch import nn\n\n\n"
        "class Interrupting(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if not self.training and type(x).__name__ == 'Tensor':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        return super().forward(x)\n\n\n"
        "def make():\n"
        "    return Interrupting(4, 2)\n"
    )
    change(
        folder,
        'example = "linear"\noptions = {inputs = 4, outputs = 2}',
        'file = "model.py"\nname = "make"',
    )
    mark = uuid.uuid4().hex
    program = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it may be ignored here
        "from wsfed.cli import main\n"
        "main()\n"
    )
    arguments = ["simulate", "-q", str(folder / "train.toml"), "--ray", "local"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--ray-workers", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "WSFED_MARK": mark},
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    while marked(mark):
        pass
