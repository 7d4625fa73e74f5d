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
