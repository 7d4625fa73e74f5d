"""``wsfed train`` and ``wsfed simulate``: a file says it all, and mistakes in it are told."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from wsfed.cli import app
from wsfed.cli.config import Configuration
from wsfed.federated import Cast, Compression, Quantise, TopK
from wsfed.testing import hub_process, worker_process

SIMULATED = """
[model]
example = "linear"
options = {inputs = 4, outputs = 2}

[data]
dataset = "points"

[training]
rounds = 3
metrics = ["accuracy"]
batch_size = 8

[optimizer]
name = "SGD"
lr = 0.5

[simulation]
data = "points.npz"
clients = 5
"""


def points(rows: int, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return {"x": x.numpy(), "labels": (x.sum(1) > 0).long().numpy()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.savez(tmp_path / "points.npz", **points(200, 0))
    (tmp_path / "train.toml").write_text(SIMULATED)
    return tmp_path


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(
        app, [str(each) for each in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )
    assert done.exit_code == code, done.output
    return done.output


def change(folder: Path, before: str, after: str) -> Path:
    assert before in SIMULATED
    file = folder / "train.toml"
    file.write_text(SIMULATED.replace(before, after))
    return file


# --- simulation -----------------------------------------------------------------------------------


@pytest.mark.blocking
def test_clients_are_simulated_and_everything_is_written(folder: Path) -> None:
    told = run("simulate", folder / "train.toml")
    assert "3 rounds" in told
    assert "5/5" in told
    state = load_file(folder / "runs" / "model.safetensors")
    assert state["1.weight"].shape == (2, 4)
    with open(folder / "runs" / "history.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 15
    assert {line["site"] for line in lines} == {f"simulation/client-{n}" for n in range(5)}
    assert sum(int(line["rows"]) for line in lines[:5]) == 160  # a fifth is held out
    assert float(lines[-1]["accuracy"]) > 0.8
    assert (folder / "runs" / "history.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.blocking
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("clients = 5", 'clients = 4\npartition = "shards"'),
        ("clients = 5", 'clients = 4\npartition = "dirichlet"\nalpha = 5.0'),
        ("clients = 5", 'clients = 4\npartition = "quantity_skew"\nalpha = 5.0'),
        ("[simulation]", '[strategy]\nname = "FedAdam"\nlr = 0.05\n\n[simulation]'),
        ("[simulation]", '[sampler]\nname = "Uniform"\nfraction = 0.5\n\n[simulation]'),
        ("[simulation]", '[privacy]\nkind = "dp"\nclip = 0.5\nnoise = 0.5\n\n[simulation]'),
        ("[simulation]", '[privacy]\nkind = "dpsgd"\nnoise = 0.5\n\n[simulation]'),
        ("[simulation]", '[privacy]\nkind = "dp"\nrows = { noise = 0.5 }\n\n[simulation]'),
        ("batch_size = 8", 'batch_size = 0\nschedule = "sequential"'),
        ("batch_size = 8", 'schedule = "async"'),
        ("batch_size = 8", 'compression = "int8"'),
        ("batch_size = 8", 'compression = {update = {name = "TopK", ratio = 0.5}}'),
    ],
)
def test_settings_are_those_of_fit(folder: Path, before: str, after: str) -> None:
    assert "3 rounds" in run("simulate", "-q", change(folder, before, after))


@pytest.mark.blocking
def test_a_model_of_ones_own_and_a_tensorboard(folder: Path) -> None:
    (folder / "model.py").write_text(
        "from torch import nn\n\n\ndef make(width):\n"
        "    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))\n"
    )
    text = SIMULATED.replace(
        'example = "linear"\noptions = {inputs = 4, outputs = 2}',
        'file = "model.py"\nname = "make"\noptions = {width = 7}',
    )
    (folder / "train.toml").write_text(text + '\n[output]\nfolder = "out"\ntensorboard = true\n')
    run("simulate", "-q", folder / "train.toml")
    assert load_file(folder / "out" / "model.safetensors")["0.weight"].shape == (7, 4)
    (events,) = (folder / "out" / "tensorboard").iterdir()
    assert b"accuracy" in events.read_bytes()


@pytest.mark.blocking
def test_a_training_goes_on(folder: Path) -> None:
    run("simulate", "-q", folder / "train.toml")
    first = load_file(folder / "runs" / "model.safetensors")
    assert "--resume" in run("simulate", "-q", folder / "train.toml", code=1)
    longer = change(folder, "rounds = 3", "rounds = 5")
    assert "5 rounds" in run("simulate", "-q", "--resume", longer)
    resumed = load_file(folder / "runs" / "model.safetensors")
    assert not torch.equal(first["1.weight"], resumed["1.weight"])
    longer.write_text(longer.read_text() + '\n[output]\nfolder = "anew"\n')
    run("simulate", "-q", longer)
    whole = load_file(folder / "anew" / "model.safetensors")
    assert torch.equal(whole["1.weight"], resumed["1.weight"])


# --- workers --------------------------------------------------------------------------------------


@pytest.fixture
def urls(tmp_path: Path) -> Iterator[list[str]]:
    with ExitStack() as stack:
        found = []
        for number, name in enumerate(("alice", "bob")):
            np.savez(tmp_path / f"{name}.npz", **points(64, number))
            options = ["--id", name, "--dataset", f"points={tmp_path / name}.npz"]
            found.append(stack.enter_context(worker_process(*options))["url"])
        yield found


@pytest.mark.processes
@pytest.mark.blocking
def test_worker_processes_train(folder: Path, urls: list[str]) -> None:
    at = SIMULATED.index("[simulation]")
    (folder / "train.toml").write_text(SIMULATED[:at] + f"[workers]\nurls = {urls}\n")
    told = run("train", folder / "train.toml")
    assert "2/2" in told
    state = load_file(folder / "runs" / "model.safetensors")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.load_state_dict(state)
    rows = points(200, 7)
    outputs = model(torch.from_numpy(rows["x"]))
    assert F.cross_entropy(outputs, torch.from_numpy(rows["labels"])).item() < 0.6


@pytest.mark.processes
@pytest.mark.blocking
def test_worker_processes_behind_a_hub_train_as_those_that_listen(
    folder: Path, tmp_path: Path, urls: list[str]
) -> None:
    at = SIMULATED.index("[simulation]")
    (folder / "train.toml").write_text(SIMULATED[:at] + f"[workers]\nurls = {urls}\n")
    run("train", "-q", folder / "train.toml")
    listening = load_file(folder / "runs" / "model.safetensors")
    with ExitStack() as stack:
        hub = stack.enter_context(hub_process())
        for name in ("alice", "bob"):
            options = ["--id", name, "--dataset", f"points={tmp_path / name}.npz"]
            options += ["--connect", hub["url"], "--tag", "points"]
            stack.enter_context(worker_process(*options))
        at_hub = f'[workers]\nhub = "{hub["url"]}"\nwait_for = 2\ntags = ["points"]\n'
        out = '[output]\nfolder = "behind"\n'
        (folder / "train.toml").write_text(SIMULATED[:at] + at_hub + out)
        run("train", "-q", folder / "train.toml")
        few = at_hub.replace("wait_for = 2", "wait_for = 3") + "timeout = 0.01\n"
        (folder / "train.toml").write_text(SIMULATED[:at] + few + out)
        assert "'alice', 'bob'" in run("train", "-q", folder / "train.toml", code=1)
    for name, value in load_file(folder / "behind" / "model.safetensors").items():
        assert torch.equal(value, listening[name]), name


@pytest.mark.processes
@pytest.mark.blocking
def test_a_killed_client_is_resumed_to_the_same_bits(folder: Path, urls: list[str]) -> None:
    """Over worker processes, which hold the killed client's session until its time is over."""
    at = SIMULATED.index("[simulation]")
    text = SIMULATED[:at].replace("rounds = 3", "rounds = 12") + f"[workers]\nurls = {urls}\n"
    text += '[strategy]\nname = "FedAdam"\nlr = 0.05\n'
    file = folder / "train.toml"
    file.write_text(text + '[output]\nfolder = "whole"\n')
    run("train", "-q", file)
    file.write_text(text)
    command = [sys.executable, "-m", "wsfed", "train", "-q", str(file)]
    with subprocess.Popen(command) as client:
        kept = folder / "runs" / "checkpoints"
        until(lambda: kept.is_dir() and len(list(kept.iterdir())) > 0)
        client.kill()
    assert client.returncode == -signal.SIGKILL
    assert not (folder / "runs" / "model.safetensors").exists()
    assert "12 rounds" in run("train", "-q", "--resume", file)
    whole, resumed = (load_file(folder / each / "model.safetensors") for each in ("whole", "runs"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def until(happened: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.blocking
@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('"SGD"', '"SDG"', "[optimizer] there is no 'SDG'; there is"),
        ("lr = 0.5", "lr = -1.0", "[optimizer] SGD: Invalid learning rate"),
        ("lr = 0.5", "speed = 1", "[optimizer] SGD:"),
        ("rounds = 3", "rounds = 0", "[training.rounds]"),
        ("rounds = 3", 'rounds = "three"', "[training.rounds]"),
        ("rounds = 3", "rounds = 3\nround = 3", "[training.round] Extra inputs"),
        ("rounds = 3", 'rounds = 3\nloss = "hinge"', "[loss] there is no 'hinge'"),
        ('["accuracy"]', '["precision"]', "[metrics] there is no 'precision'"),
        ('"linear"', '"resnet"', "[model.example]"),
        ("outputs = 2", "classes = 2", "[model] TypeError"),
        ('example = "linear"', 'file = "no.py"\nname = "Net"', "there is no such file"),
        ('example = "linear"', "", "one of them"),
        ("[simulation]", '[strategy]\nname = "FedSuper"\n[simulation]', "there is no 'FedSuper'"),
        ("[simulation]", '[strategy]\nname = "FedProx"\nmu = -1\n[simulation]', "FedProx: mu"),
        ("[simulation]", '[privacy]\nkind = "secagg"\n[simulation]', "needs a roster"),
        ("[simulation]", '[privacy]\nkind = "dp"\nnoise = 0\n[simulation]', "[privacy]"),
        ("[simulation]", '[privacy]\nkind = "dpsgd"\nrows = {}\n[simulation]', "another kind"),
        ("[simulation]", '[privacy]\nkind = "dp"\nrows = { clip = 0 }\n[simulation]', "clip=0"),
        ("points.npz", "no.npz", "[simulation] "),
        ("clients = 5", "clients = 500", "[simulation] "),
        ("clients = 5", 'clients = 5\npartition = "shards"\nlabels = "z"', "no field 'z'"),
        ("[training]", "[training", "is no TOML"),
        ("rounds = 3", 'rounds = 3\ncompression = "zip"', "[training.compression] compression is"),
        ("rounds = 3", "rounds = 3\ncompression = {}", "[training.compression] nothing would be"),
        ("rounds = 3", 'rounds = 3\ncompression = {update = {name = "Zip"}}', "there is no 'Zip'"),
        (
            "rounds = 3",
            'rounds = 3\ncompression = {update = {name = "TopK", ratio = 2}}',
            "TopK: ratio is above 0",
        ),
        ("inputs = 4", "inputs = 5", "cannot be multiplied"),
    ],
)
def test_a_mistake_is_told_with_its_place(folder: Path, before: str, after: str, says: str) -> None:
    told = run("simulate", "-q", change(folder, before, after), code=1)
    assert says in " ".join(told.split())
    assert "Traceback" not in told


@pytest.mark.blocking
def test_a_file_that_is_not_there_and_workers_that_are_nowhere(folder: Path) -> None:
    assert "No such file" in run("train", folder / "no.toml", code=1)
    assert "[workers] there are no urls" in run("train", "-q", folder / "train.toml", code=1)
    at = SIMULATED.index("[simulation]")
    file = folder / "train.toml"
    file.write_text(SIMULATED[:at] + '[workers]\nurls = ["ws://127.0.0.1:1"]\n')
    assert "no connection to ws://127.0.0.1:1" in run("train", "-q", file, code=1)
    file.write_text(SIMULATED[:at])
    assert "[simulation] says" in run("simulate", "-q", file, code=1)


@pytest.mark.parametrize("number", [0, 1])
def test_the_files_of_the_documentation_are_read(number: int) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "train.md").read_text()
    text = re.findall(r"```toml\n(.*?)```", page, re.S)[number]
    settings = Configuration.model_validate(tomllib.loads(text))
    if settings.privacy is None:
        settings.arguments(Path())


def test_compression_is_a_word_or_a_table(folder: Path) -> None:
    def made(line: str) -> Compression | None:
        text = (folder / "train.toml").read_text().replace("rounds = 3", f"rounds = 3\n{line}")
        found: Compression | None = Configuration.model_validate(tomllib.loads(text)).arguments(
            folder
        )["compression"]
        return found

    assert made("") is None
    assert made('compression = "bf16"') == Compression(Cast("bf16"), Cast("bf16"))
    both = made('compression = {update = {name = "TopK", ratio = 0.5}, broadcast = "fp16"}')
    assert both == Compression(TopK(0.5), Cast("fp16"))
    assert made('compression = {broadcast = "bf16"}') == Compression(None, Cast("bf16"))
    assert made('compression = {update = "int8"}') == Compression(Quantise(8))


def test_help_has_an_example() -> None:
    assert "wsfed train digits.toml" in run("train", "--help")
    assert "wsfed simulate" in run("simulate", "--help")
