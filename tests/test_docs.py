"""The documentation is true: its programs run, and every public name is in it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import wsfed
from wsfed.protocol import messages

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = [
    pytest.param(program, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "reference.md"
    for number, program in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    )
] + [pytest.param(page.read_text(), id=page.name) for page in (ROOT / "examples").glob("*.py")]


@pytest.mark.blocking
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_the_documentation_runs(
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "program.py"
    file.write_text(program)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(file), run_name="__main__")
    said = capfd.readouterr()
    assert said.out
    assert not said.err


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "examples" / "first.py"])
def test_the_first_program_runs_by_itself(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    file = tmp_path / "program.py"
    file.write_text(
        re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[0] if page.suffix == ".md" else text
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", file],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_message_and_error_has_its_heading() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    protocol = (ROOT / "docs" / "protocol.md").read_text()
    for name in wsfed.__all__:
        assert name.startswith("__") or re.search(rf"^### (wsfed\.)?{name}$", reference, re.M), name
    for cls in messages.BY_CODE.values():
        assert f"#### {cls.__name__}\n" in protocol


def test_every_public_name_has_a_docstring() -> None:
    for name in wsfed.__all__:
        assert name.startswith("__") or getattr(wsfed, name).__doc__, name
