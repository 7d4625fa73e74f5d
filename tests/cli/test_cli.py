"""The command line: help with examples, helpful errors, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import wsfed
from wsfed.cli import app
from wsfed.cli.worker import parse_size


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", ["worker", "status", "demo"])
def test_help_has_examples(command: str) -> None:
    code, said = run(command, "--help")
    assert code == 0
    assert "Example" in said
    assert f"wsfed {command}" in said


def test_the_version_is_told() -> None:
    assert run("--version") == (0, f"wsfed {wsfed.__version__}")


def test_a_command_that_does_not_exist_is_wrong_usage() -> None:
    assert run("trian")[0] == 2


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--dataset", "digits"), 2, "is not NAME=PATH"),
        (("--dataset", "digits=/nowhere/digits.npz"), 1, "there is no such file"),
        (("--dataset", "digits=/nowhere/digits.xls"), 1, "is not one of .csv .npz .pt"),
        (("--dataset", "a=x.csv", "--dataset", "a=y.csv"), 2, "a: that name is given twice"),
        (("--open", "digits"), 2, "there is no --dataset of that name"),
        (("--host", "0.0.0.0"), 2, "say --insecure"),
        (("--device", "warp"), 2, "--device warp"),
        (("--max-memory", "lots"), 2, "write 500MB, 8GB"),
        (("--tls-cert", "cert.pem"), 2, "go together"),
        (("--token-file", "/nowhere/token"), 1, "/nowhere/token"),
        (("--port", "70000"), 2, "65535"),
    ],
)
def test_a_mistake_is_told_with_what_to_do(words: tuple[str, ...], code: int, says: str) -> None:
    result, said = run("worker", *words)
    assert says in said
    assert result == code


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.npz", b"PK\x03\x04 not a zip"),
        ("rows.csv", b"a,b\n1,two\n"),
        ("rows.pt", b"\x80\x04cos\nsystem\n."),
        ("rows.safetensors", b"\xff" * 16),
    ],
)
def test_a_malformed_data_file_is_told_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    code, said = run("worker", "--port", "0", "--dataset", f"rows={tmp_path / name}")
    assert code == 1
    assert name in said
    assert "Traceback" not in said


def test_an_empty_token_and_certificates_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    code, said = run("worker", "--token-file", str(tmp_path / "token"))
    assert (code, "one word, the token" in said) == (2, True)
    (tmp_path / "token").write_text("one\ntwo\n")
    code, said = run("worker", "--token-file", str(tmp_path / "token"))
    assert (code, "one word, the token" in said) == (2, True)
    code, said = run("worker", "--token-file", str(tmp_path / "none"))
    assert (code, "--token-file" in said, "No such file" in said) == (1, True, True)
    code, said = run("worker", "--id", " ")
    assert (code, "--id needs a name" in said) == (2, True)
    (tmp_path / "cert.pem").write_text("nonsense")
    pem = str(tmp_path / "cert.pem")
    code, said = run("worker", "--tls-cert", pem, "--tls-key", pem)
    assert code == 1
    assert "cert.pem" in said


def test_a_word_without_a_command_and_no_word_at_all_show_the_help() -> None:
    code, said = run()
    assert "worker" in said and "status" in said and "demo" in said
    assert code in (0, 2)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20),
        ("500MB", 500 * 2**20),
        ("8GB", 8 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("2k", 2048),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_worker_tells_where_it_is_serves_and_ends_in_order(
    tmp_path: Path, number: signal.Signals
) -> None:
    np.savez(tmp_path / "rows.npz", x=np.ones((3, 2), np.float32))
    command = [sys.executable, "-m", "wsfed", "worker", "--id", "bob", "--port", "0", "--json"]
    command += ["--dataset", f"rows={tmp_path / 'rows.npz'}", "--max-memory", "1GB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        told = json.loads(process.stdout.readline())
        assert told["id"] == "bob"
        assert told["datasets"] == {"rows": {"rows": 3, "open": False}}
        assert told["max_memory"] == 2**30
        async with wsfed.connect(told["url"]) as bob:
            assert (await bob.dataset("rows")).rows == 3
            process.send_signal(number)
            with pytest.raises(wsfed.SessionLost, match="shutting down"):
                while True:
                    await bob.flush()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with wsfed.Node("bob") as node, node.listen() as where:
        yield where


async def status(*words: str) -> tuple[int, str]:
    import asyncio

    return await asyncio.to_thread(run, "status", *words)


async def test_the_status_of_a_worker_is_told(url: str) -> None:
    code, said = await status(url)
    assert code == 0
    assert "bob" in said
    assert url in said
    code, said = await status("--json", url)
    assert json.loads(said)[0]["id"] == "bob"


async def test_a_worker_that_does_not_answer_is_told_and_fails(url: str) -> None:
    code, said = await status(url, "ws://127.0.0.1:9", "http://x")
    assert code == 1
    assert "bob" in said
    assert "is a worker running there?" in said
    assert "write ws://host:port" in said


async def test_the_status_of_a_locked_worker_needs_its_token() -> None:
    async with wsfed.Node("bob", token="secret") as node, node.listen() as where:
        code, said = await status(where)
        assert (code, "a token is needed" in said) == (1, True)
        code, said = await status("--token", "secret", "--json", where)
        assert code == 0
        assert "secret" not in said


def test_the_demo_equals_torch() -> None:
    code, said = run("demo", "--rounds", "2")
    assert code == 0
    assert "4 losses, each bit for bit that of plain torch" in said
