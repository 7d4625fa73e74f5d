"""``wsfed hub`` and ``wsfed worker --connect`` as processes: they find each other, also again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from typer.testing import CliRunner

import wsfed
from wsfed.cli import app
from wsfed.testing import hub_process, worker_process


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@contextmanager
def killed_process(*words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A hub that is there to be killed; gives its URL."""
    command = [sys.executable, "-m", "wsfed", "hub", "--json", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], process
        finally:
            process.kill()


def test_help_has_examples() -> None:
    code, said = run("hub", "--help")
    assert code == 0
    assert "Example" in said and "wsfed hub" in said


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("hub", "--host", "0.0.0.0"), 2, "say --insecure"),
        (("hub", "--token-file", "/nowhere/token"), 1, "/nowhere/token"),
        (("hub", "--node-token-file", "/nowhere/token"), 2, "goes with --token-file"),
        (("hub", "--tls-cert", "cert.pem"), 2, "go together"),
        (("worker", "--connect", "http://127.0.0.1"), 2, "write ws://host:port"),
        (("worker", "--connect", "ws://127.0.0.1:1", "--tag", " "), 2, "Enrol.tags has to be"),
        (("worker", "--tag", "digits"), 2, "go with --connect"),
        (("worker", "--connect", "ws://h:1", "--tls-cert", "c.pem"), 2, "does not listen"),
        (("worker", "--connect", "ws://h:1", "--tls-ca", "/nowhere/ca"), 1, "/nowhere/ca"),
        (("worker", "--connect", "ws://h:1", "--hub-token-file", "/nowhere/t"), 1, "/nowhere/t"),
    ],
)
def test_a_mistake_is_told_with_what_to_do(words: tuple[str, ...], code: int, says: str) -> None:
    result, said = run(*words)
    assert says in said
    assert result == code


@pytest.mark.blocking
@pytest.mark.processes
async def test_a_hub_that_is_killed_and_started_again_is_no_loss_to_a_session() -> None:
    with killed_process("--port", "0") as (url, hub):
        port = str(urlsplit(url).port)
        with worker_process("--connect", url, "--id", "alice", "--tag", "digits") as told:
            assert (told["hub"], told["id"]) == (url, "alice")
            async with wsfed.hub(url, reconnect=100) as client:
                (alice,) = await client.wait_for(1, {"digits"})
                x = alice.send(torch.arange(1000.0))
                assert torch.equal(await (x + 1), torch.arange(1000.0) + 1)
                for _ in range(3):
                    x = x + 1
                hub.kill()
                hub.wait()
                for _ in range(3):
                    x = x + 1
                with killed_process("--port", port) as (again, _):
                    assert again == url
                    assert torch.equal(await x, torch.arange(1000.0) + 6)
                    assert [worker.id for worker in await client.wait_for(1)] == ["alice"]


@pytest.mark.blocking
@pytest.mark.processes
async def test_a_worker_that_was_killed_comes_back_under_its_name() -> None:
    with hub_process() as hub:
        async with wsfed.hub(hub["url"]) as client:
            events = client.events()
            with worker_process("--connect", hub["url"], "--id", "alice") as first:
                assert (await anext(events)).kind == "joined"
                os.kill(first["pid"], signal.SIGKILL)
                assert (await anext(events)).kind == "left"
            with worker_process("--connect", hub["url"], "--id", "alice"):
                assert (await anext(events)).kind == "joined"
                async with client.worker("alice") as alice:
                    assert torch.equal(await alice.send(torch.ones(2)), torch.ones(2))


@pytest.mark.processes
def test_a_name_that_is_taken_and_a_wrong_token_end_a_worker(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("right")
    (tmp_path / "wrong").write_text("wrong")
    command = [sys.executable, "-m", "wsfed", "worker", "--id", "alice"]
    with hub_process("--token-file", str(tmp_path / "token"), quiet=True) as hub:
        command += ["--connect", hub["url"]]
        right = ("--hub-token-file", str(tmp_path / "token"))
        for options, says in (
            (("--hub-token-file", str(tmp_path / "wrong")), "the token is wrong"),
            ((), "a token is needed"),
        ):
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
            assert (done.returncode, says in done.stderr) == (1, True)
        with worker_process("--connect", hub["url"], "--id", "alice", *right):
            done = subprocess.run([*command, *right], capture_output=True, text=True, timeout=60)
            assert done.returncode == 1
            assert "there is another node 'alice' already" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_hub_ends_in_order(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "wsfed", "hub", "--json", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["url"].startswith("ws://127.0.0.1:")
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


def test_a_port_that_is_taken_is_told() -> None:
    with hub_process() as hub:
        port = str(urlsplit(hub["url"]).port)
        command = [sys.executable, "-m", "wsfed", "hub", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "try --port 0" in done.stderr
