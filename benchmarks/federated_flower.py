"""Flower, doing the same job, in a virtual environment of its own: installed once, then kept.

Its local deployment: a SuperLink and two SuperNodes, on free ports of this machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from benchmarks.federated_tasks import CHECKOUT

__all__ = ["Run", "Told", "measure"]

_WANTED: Final = "flwr==1.42.*"
_ELSE: Final = "flwr>=1,<2"
#: Seconds that the whole run may take; a round took about ten on two cores.
_PATIENCE: Final = 60.0
_A_ROUND: Final = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """One run of Flower's.

    Attributes:
        seconds: of each round but the first, which starts processes for the first time.
        first: seconds of that one.
        whole: seconds from ``flwr run`` to its end.
    """

    seconds: list[float]
    first: float
    whole: float

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds)

    @property
    def rounds(self) -> int:
        """That were counted."""
        return len(self.seconds)


@dataclass(frozen=True, slots=True)
class Told:
    """What Flower has done.

    Attributes:
        version: of it.
        runs: by what was run.
        notes: for people.
    """

    version: str
    runs: Mapping[str, Run]
    notes: list[str]


def measure(cache: Path, rounds: int) -> Told:
    """Install it if it is not there, and run it.

    Args:
        cache: folder of its environment; kept.
        rounds: that are counted; there is one before them.

    Raises:
        RuntimeError: it cannot be installed, or does not run.
    """
    folder = cache.resolve() / "flower"
    folder.mkdir(parents=True, exist_ok=True)
    version, notes = _installed(folder / "venv")
    run = _deployed(folder, rounds + 1)
    notes.append(f"Flower's first round took {run.first:.1f} s")
    return Told(version, {"SuperLink and 2 SuperNodes": run}, notes)


# --- installing -----------------------------------------------------------------------------------


def _installed(venv: Path) -> tuple[str, list[str]]:
    """The version that is there in the end, and what there is to tell of it."""
    if not (venv / "ready").exists():
        _call([sys.executable, "-m", "venv", str(venv)])
        _pip(venv, "torch", "numpy")
        try:
            _pip(venv, _WANTED)
        except RuntimeError:
            _pip(venv, _ELSE)
        (venv / "ready").touch()
    ask = "import importlib.metadata as m; print(m.version('flwr'))"
    version = _call([str(venv / "bin" / "python"), "-c", ask]).split()[-1]
    wanted = _WANTED.removeprefix("flwr==").removesuffix("*")
    return version, [] if version.startswith(wanted) else [f"{_WANTED} could not be had"]


def _pip(venv: Path, *packages: str) -> None:
    """Of the checkout's constraints only torch's counts: Flower has needs of its own."""
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    constraints = venv / "constraints.txt"
    constraints.write_text("".join(f"{each}\n" for each in lines if each.startswith("torch==")))
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    _call([*pip, "--constraint", str(constraints), *packages], timeout=1800)


def _call(command: list[str], timeout: float = 300) -> str:
    """Run a program to its end; gives its output.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command[:4])} took more than {timeout:.0f} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise RuntimeError(f"{' '.join(command[:4])} failed: {said}")
    return done.stdout


# --- running --------------------------------------------------------------------------------------

_PROJECT: Final = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "flowerbench"
version = "1.0.0"
description = "The small MLP"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "benchmarks"

[tool.flwr.app.components]
serverapp = "flowerbench.app:server"
clientapp = "flowerbench.app:client"

[tool.flwr.app.config]
rounds = {rounds}
stamps = "{stamps}"
"""

_APP: Final = '''\
"""The small MLP, one local epoch over 64 rows."""

import time

import torch
from torch import nn
from torch.nn import functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

torch.set_num_threads(1)
client = ClientApp()
server = ServerApp()


def mlp():
    return nn.Sequential(
        nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


@client.train()
def train(message: Message, context: Context) -> Message:
    model = mlp()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    x = torch.randn(64, 784, generator=generator)
    y = torch.randint(0, 10, (64,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for rows in torch.randperm(64).split(32):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"loss": loss.item(), "num-examples": 64})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    def stamp(round: int, arrays: ArrayRecord):
        with open(str(context.run_config["stamps"]), "a") as file:
            print(time.time(), file=file)
        return MetricRecord({"round": round})

    FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0).start(
        grid=grid,
        initial_arrays=ArrayRecord(mlp().state_dict()),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=stamp,
    )
'''

#: ``flwr run`` looks for addresses here.
_HOME: Final = """\
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
insecure = true
"""


def _deployed(folder: Path, rounds: int) -> Run:
    """Rounds by the local deployment."""
    app, home, stamps = folder / "app", folder / "home", folder / "stamps"
    for each in (app, home):
        shutil.rmtree(each, ignore_errors=True)
    stamps.unlink(missing_ok=True)
    (app / "flowerbench").mkdir(parents=True)
    home.mkdir()
    ports = _free_ports(3)
    (app / "pyproject.toml").write_text(_PROJECT.format(rounds=rounds, stamps=stamps))
    (app / "flowerbench" / "__init__.py").touch()
    (app / "flowerbench" / "app.py").write_text(_APP)
    (home / "config.toml").write_text(_HOME.format(port=ports[0]))
    programs = folder / "venv" / "bin"
    environment = dict(os.environ, FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED="0")
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    with ExitStack() as stack:
        link = [str(programs / "flower-superlink"), "--insecure"]
        link += ["--host", "127.0.0.1", "--port", str(ports[0])]
        link += ["--disable-runtime-dependency-installation"]
        stack.enter_context(_going_on(link, environment, folder / "superlink.log"))
        _wait_for(ports[0])
        for at, port in enumerate(ports[1:]):
            node = [str(programs / "flower-supernode"), "--insecure"]
            node += ["--superlink", f"127.0.0.1:{ports[0]}", "--host", "127.0.0.1"]
            node += ["--port", str(port), "--node-config", f"partition-id={at}"]
            stack.enter_context(_going_on(node, environment, folder / f"supernode-{at}.log"))
            _wait_for(port)
        whole = _run_app(programs, app, environment, _PATIENCE + rounds * _A_ROUND)
    if not stamps.exists() or len(stamps.read_text().split()) != rounds + 1:
        raise RuntimeError(f"flwr run did not finish its rounds; see the logs in {folder}")
    times = [float(each) for each in stamps.read_text().split()]
    seconds = [after - before for before, after in pairwise(times)]
    return Run(seconds[1:], seconds[0], whole)


def _run_app(programs: Path, app: Path, environment: Mapping[str, str], timeout: float) -> float:
    """``flwr run`` to its end; gives its seconds."""
    command = [str(programs / "flwr"), "run", str(app), "here", "--stream"]
    begun = time.perf_counter()
    with (app.parent / "run.log").open("wb") as log:
        try:
            done = subprocess.run(
                command, env=environment, stdout=log, stderr=log, timeout=timeout, cwd=app.parent
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"flwr run took more than {timeout:.0f} s") from None
    if done.returncode:
        said = (app.parent / "run.log").read_text(errors="replace").strip()[-500:]
        raise RuntimeError(f"flwr run failed: {said}")
    return time.perf_counter() - begun


@contextmanager
def _going_on(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """A program with all that it starts: a process group of its own, which is ended."""
    with log.open("wb") as told:
        process = subprocess.Popen(
            command, env=environment, stdout=told, stderr=told, start_new_session=True
        )
        try:
            yield
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the group is ours alone
    except ProcessLookupError:
        pass
    process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different; Flower takes no 0."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _wait_for(port: int, seconds: float = 60.0) -> None:
    """Until something listens there.

    Raises:
        RuntimeError: nothing does.
    """
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"nothing of Flower's listens after {seconds:.0f} s")
