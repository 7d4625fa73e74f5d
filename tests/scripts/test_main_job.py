"""The main job: worker processes with real data, one model over them, both schedules."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from safetensors.torch import load_file

import digits
import start_workers
import train
import wsfed

SCRIPTS = Path(train.__file__).parent

pytestmark = pytest.mark.processes


def document(stream: IO[str]) -> str:
    """What is printed up to the first brace on a line of its own, or to the end."""
    lines = []
    for line in stream:
        lines.append(line)
        if line == "}\n":
            break
    return "".join(lines)


@pytest.fixture(scope="module", params=["iid", "label"])
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """Four worker processes: the file that tells where they are, and how the digits are split."""
    folder = tmp_path_factory.mktemp("runs")
    file = folder / "workers.json"
    command = [sys.executable, str(SCRIPTS / "start_workers.py"), "--workers", "4"]
    command += ["--split", request.param, "--folder", str(folder), "--json-file", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            started = json.loads(document(process.stdout))
            assert json.loads(file.read_text()) == started
            yield file, request.param
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    for worker in started["workers"]:
        with pytest.raises(ProcessLookupError):
            os.kill(worker["pid"], 0)


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
def test_held_out_digits_are_recognised(
    workers: tuple[Path, str], schedule: str, tmp_path: Path
) -> None:
    file, split = workers
    assert json.loads(file.read_text())["split"] == split
    words = ["--workers-json", str(file), "--schedule", schedule, "--out", str(tmp_path)]
    if (split, schedule) != ("iid", "concurrent"):
        words.append("--no-baseline")  # once is enough
    assert train.main(words) == 0
    with open(tmp_path / f"{schedule}.csv", newline="") as metrics:
        rounds = list(csv.DictReader(metrics))
    assert len(rounds) == 10
    accuracy = float(rounds[-1]["accuracy"])
    assert accuracy >= 0.95
    assert int(rounds[-1]["bytes_up"]) > 0
    model = train.build("cnn", 0)
    model.load_state_dict(load_file(tmp_path / f"{schedule}.safetensors"))
    assert train.accuracy_of(model, digits.load()[1]) == pytest.approx(accuracy)
    assert (tmp_path / f"{schedule}.png").read_bytes().startswith(b"\x89PNG")


def test_parts_are_all_rows_once() -> None:
    rows, test = digits.load()
    assert (len(rows), len(test)) == (1438, 359)
    for how in ("iid", "label"):
        parts = digits.split(rows, 4, how)
        assert sum(map(len, parts)) == len(rows)
        together = np.concatenate([part.images for part in parts])
        assert np.array_equal(np.sort(together, 0), np.sort(rows.images, 0))
    assert all(len(set(part.labels)) <= 4 for part in digits.split(rows, 4, "label"))
    for count, how in ((0, "iid"), (4, "colour")):
        with pytest.raises(ValueError, match="rows"):
            digits.split(rows, count, how)


async def test_workers_end_when_the_program_that_started_them_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "start_workers.py"), "--workers", "1"]
    command += ["--folder", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        (worker,) = json.loads(document(process.stdout))["workers"]
        async with wsfed.connect(worker["url"]) as handle:
            await handle.flush()
            process.kill()
            with pytest.raises(wsfed.SessionLost, match="shutting down"):
                while True:
                    await handle.flush()


def start(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "start_workers.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--workers", "0"), "at least one worker"),
        (("--workers", "2", "--ids", "a", "a"), "2 different names"),
        (("--workers", "2", "--ports", "0"), "2 ports"),
        (("--workers", "2", "--data", "one.npz"), "2 files"),
    ],
)
def test_a_wrong_number_of_something_is_told(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        start_workers.parse(words)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_a_worker_that_cannot_start_stops_them_all(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=np.ones((3, 2), np.float32))
    files = [str(tmp_path / "good.npz"), str(tmp_path / "missing.npz")]
    ended = start("--workers", "2", "--data", *files)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "missing.npz" in ended.stderr
    assert "worker-2 did not start" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_worker_that_ends_by_itself_stops_the_others_and_training_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "workers.json"
    command = [sys.executable, str(SCRIPTS / "start_workers.py"), "--workers", "2"]
    command += ["--folder", str(tmp_path), "--json-file", str(file)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first, second = json.loads(document(process.stdout))["workers"]
        os.kill(first["pid"], signal.SIGKILL)
        assert process.wait(30) == 1
        assert "worker-1 was ended by SIGKILL; the others are stopped" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(second["pid"], 0)
    assert train.main(["--workers-json", str(file), "--out", str(tmp_path)]) == 1
    assert "is a worker running there?" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("schedule", ["sequential", "concurrent"])
def test_the_worker_that_was_killed_is_the_one_that_is_named(tmp_path: Path, schedule: str) -> None:
    file = tmp_path / "workers.json"
    start = [sys.executable, str(SCRIPTS / "start_workers.py"), "--ids", "ann", "ben", "cy"]
    start += ["--folder", str(tmp_path), "--json-file", str(file)]
    learn = [sys.executable, str(SCRIPTS / "train.py"), "--workers-json", str(file)]
    learn += ["--schedule", schedule, "--rounds", "10000", "--model", "mlp", "--out", str(tmp_path)]
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True) as workers:
        assert workers.stdout is not None
        ben = json.loads(document(workers.stdout))["workers"][1]
        with subprocess.Popen(learn, stdout=subprocess.PIPE, text=True) as training:
            assert training.stdout is not None
            assert "ben" in training.stdout.readline()  # all are connected
            os.kill(ben["pid"], signal.SIGKILL)
            said = " ".join(training.stdout.read().split())
            assert training.wait(30) == 1
    assert "worker 'ben'" in said
    assert "'cy'" not in said


def test_files_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, _ = digits.load()
    files = [tmp_path / "one.npz", tmp_path / "other.npz"]
    for file, part in zip(files, digits.split(rows, 2, "iid"), strict=True):
        part.save(file)
    told = tmp_path / "workers.json"
    command = [sys.executable, str(SCRIPTS / "start_workers.py"), "--json-file", str(told)]
    command += ["--data", *map(str, files)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        document(process.stdout)
        words = ["--workers-json", str(told), "--out", str(tmp_path), "--rounds", "2"]
        assert train.main(words) == 0
        said = capsys.readouterr().out
        assert "no held-out rows" in said and "centralised" not in said
        assert train.main([*words, "--test", str(files[0])]) == 0
        assert "held-out rows" in capsys.readouterr().out
        process.terminate()


def test_rows_of_another_shape_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((30, 16), np.float32), y=np.zeros(30, np.int64))
    told = tmp_path / "workers.json"
    command = [sys.executable, str(SCRIPTS / "start_workers.py"), "--json-file", str(told)]
    command += ["--data", str(tmp_path / "x.npz")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        document(process.stdout)
        assert train.main(["--workers-json", str(told), "--out", str(tmp_path)]) == 1
        assert "images have to be of 1 x 8 x 8" in " ".join(capsys.readouterr().out.split())
        process.terminate()


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "malformed", "other"])
def test_a_file_of_workers_that_is_none_is_told(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "workers.json"
    if content is not None:
        file.write_text(content)
    assert train.main(["--workers-json", str(file)]) == 1
    assert "start_workers.py writes it" in " ".join(capsys.readouterr().out.split())
