"""What a worker offers, from its command line."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import wsfed
from wsfed.cli import app
from wsfed.errors import GetNotPermitted


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "300", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@contextlib.contextmanager
def worker(folder: Path, *words: str) -> Iterator[dict[str, Any]]:
    """A worker that was started in this folder, and what it tells about itself."""
    # The command itself, not -m, which would put the folder on Python's path.
    command = [str(Path(sys.executable).parent / "wsfed"), "worker", "--port", "0", "--json"]
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True, cwd=folder)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0


def write_images(folder: Path) -> None:
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(5):
            pixels = np.full((4 + number, 6, 3), 50 * number, np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / label / f"{number}.png")


@pytest.mark.processes
async def test_a_folder_is_offered_resized_and_split(tmp_path: Path) -> None:
    write_images(tmp_path)
    words = ("--transform", "pets/images=resize:4", "--transform", "pets/images=scale:1/255")
    options = ("--split", "pets=0.2,seed=7", "--open", "pets-validation")
    with worker(tmp_path, "--dataset", "pets=photos", *words, *options) as told:
        assert told["datasets"] == {
            "pets": {"rows": 8, "open": False},
            "pets-validation": {"rows": 2, "open": True},
        }
        async with wsfed.connect(told["url"]) as pets:
            validation = await pets.dataset("pets-validation")
            images, labels = await validation["images"].get(), await validation["labels"].get()
            train = await pets.dataset("pets")
            with pytest.raises(GetNotPermitted):
                await train["images"].get()
    assert images.shape == (2, 3, 4, 4)
    assert images.dtype is torch.float32
    assert float(images.max()) <= 200 / 255
    assert labels.tolist() == [0, 1]


@pytest.mark.processes
async def test_a_function_in_the_workers_folder_is_offered(tmp_path: Path) -> None:
    (tmp_path / "clinic_cli.py").write_text(
        "import numpy as np\ndef scans():\n    return {'x': np.arange(6).reshape(3, 2)}\n"
    )
    # It does not take the place of a module of Python's.
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module was imported')\n")
    words = ("--dataset", "scans=python:clinic_cli:scans", "--open", "scans")
    with worker(tmp_path, *words, "--transform", "scans/x=cast:float32|rename:features") as told:
        async with wsfed.connect(told["url"]) as clinic:
            rows = await (await clinic.dataset("scans"))["features"].get()
    assert torch.equal(rows, torch.arange(6.0).reshape(3, 2))


@pytest.mark.processes
async def test_text_is_offered_as_token_ids(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("ab\nc\n")
    words = ("--dataset", "notes=notes.txt", "--open", "notes")
    with worker(tmp_path, *words, "--transform", "notes/text=tokenise:bytes,length=3") as told:
        async with wsfed.connect(told["url"]) as clinic:
            notes = await clinic.dataset("notes")
            tokens, lengths = await notes["tokens"].get(), await notes["lengths"].get()
    assert tokens.tolist() == [[98, 99, 0], [100, 0, 0]]
    assert lengths.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--transform", "scans/x=drop"), 2, "--transform scans: there is no --dataset of that"),
        (("--split", "scans=0.2"), 2, "--split scans: there is no --dataset of that name"),
        (("--open", "rows-validation"), 2, "there is no --dataset of that name"),
        (("--transform", "rows=drop"), 2, "is not NAME/FIELD=TRANSFORM"),
        (("--transform", "rows/x=eval:1"), 2, "there is no transform 'eval'; there is cast"),
        (("--transform", "rows/z=drop"), 1, "rows.csv: there is no field 'z'; there is 'features'"),
        (("--transform", "rows/features=drop"), 1, "rows.csv: there is no field in it"),
        (("--split", "rows=2"), 2, "is not NAME=FRACTION"),
        (("--split", "rows=0.5", "--split", "rows=0.2"), 2, "--split rows: it is given twice"),
        (("--split", "rows=0.01"), 1, "0.01 of 2 rows leaves no row to validate with"),
        (("--dataset", "x=python:clinic"), 2, "is not python:MODULE:FUNCTION"),
        (("--dataset", "x=python:clinic_absent:scans"), 1, "there is no module 'clinic_absent'"),
        (
            ("--dataset", "rows-validation=x.csv", "--split", "rows=0.5"),
            2,
            "--dataset rows-validation: that name is given twice",
        ),
    ],
)
def test_a_mistake_is_told_with_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    (tmp_path / "rows.csv").write_text("1,2\n3,4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result, said = run("worker", "--port", "0", "--dataset", "rows=rows.csv", *words)
    assert says in said
    assert result == code
    assert "Traceback" not in said


def test_help_names_the_options() -> None:
    code, said = run("worker", "--help")
    assert code == 0
    for words in ("NAME/FIELD=TRANSFORM", "NAME=FRACTION", "python:MODULE:FUNCTION", ".parquet"):
        assert words in said
