"""Keys and rosters from the command line, and workers that take part with them."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import wsfed
from wsfed import federated
from wsfed.cli import app
from wsfed.privacy.roster import load_roster
from wsfed.testing import worker_process


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """Public keys of an owner and three workers, by the names of their files."""
    names = ("owner", "alice", "bob", "carol")
    return {name: run("keygen", tmp_path / f"{name}.key").strip() for name in names}


@pytest.fixture
def roster(tmp_path: Path, keys: dict[str, str]) -> Path:
    file = tmp_path / "clinics.json"
    members = [f"--member={name}={keys[name]}" for name in ("alice", "bob", "carol")]
    told = run("roster", file, "--owner", tmp_path / "owner.key", "--bound", 3, *members)
    assert told.strip() == keys["owner"]
    return file


def test_a_private_key_is_for_its_owner_only(tmp_path: Path, keys: dict[str, str]) -> None:
    assert len({*keys.values()}) == 4
    assert all(len(bytes.fromhex(key)) == 32 for key in keys.values())
    assert stat.S_IMODE((tmp_path / "alice.key").stat().st_mode) == 0o600
    before = (tmp_path / "alice.key").read_bytes()
    assert "exists" in run("keygen", tmp_path / "alice.key", code=1)
    assert (tmp_path / "alice.key").read_bytes() == before


def test_a_roster_is_signed(roster: Path, keys: dict[str, str]) -> None:
    checked = load_roster(roster).check(keys["owner"])
    assert checked.order == ["alice", "bob", "carol"]
    assert (checked.id, checked.bound) == ("clinics", 3.0)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--member=alice"], 2, "NAME=KEY"),
        (["--member=alice=00", "--member=alice=01"], 2, "given twice"),
        (["--member=a=00", "--member=b=01"], 1, "3 to 128"),
        (["--member=a=zz", "--member=b=01", "--member=c=02"], 1, "hexadecimal"),
    ],
)
def test_a_roster_of_nobody_is_refused(
    tmp_path: Path, keys: dict[str, str], arguments: list[str], code: int, says: str
) -> None:
    owner = tmp_path / "owner.key"
    assert says in run("roster", tmp_path / "no.json", "--owner", owner, *arguments, code=code)
    assert not (tmp_path / "no.json").exists()


def test_a_file_that_is_no_key_is_told(tmp_path: Path, keys: dict[str, str]) -> None:
    (tmp_path / "no.key").write_text("x")
    members = [f"--member={name}={keys[name]}" for name in ("alice", "bob", "carol")]
    told = run("roster", tmp_path / "r.json", "--owner", tmp_path / "no.key", *members, code=1)
    assert "no key of wsfed keygen" in told


def test_options_of_a_member_go_together(roster: Path) -> None:
    assert "go together" in run("worker", "--roster", roster, code=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--id": "mallory"}, "no member 'mallory'"),
        ({"--key": "bob.key"}, "with this key"),
        ({"--roster-owner": "00" * 32}, "is not signed by the owner"),
        ({"--journal": "clinics.json"}, "no journal"),
        ({"--roster": "alice.key"}, "no roster"),
    ],
)
def test_a_worker_does_not_start_as_another_member(
    tmp_path: Path, roster: Path, keys: dict[str, str], change: dict[str, str], says: str
) -> None:
    options = {
        "--id": "alice",
        "--roster": "clinics.json",
        "--roster-owner": keys["owner"],
        "--key": "alice.key",
        "--journal": "alice.journal",
        **change,
    }
    files = ("--roster", "--key", "--journal")
    given = [
        each
        for name, value in options.items()
        for each in (name, tmp_path / value if name in files else value)
    ]
    assert says in run("worker", *given, code=1)


@pytest.fixture
def clinics(tmp_path: Path, roster: Path, keys: dict[str, str]) -> Iterator[list[str]]:
    """URLs of three worker processes that are members."""
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        urls = []
        for name in ("alice", "bob", "carol"):
            x = torch.randn(64, 4, generator=generator)
            np.savez(tmp_path / f"{name}.npz", x=x.numpy(), y=(x.sum(1) > 0).long().numpy())
            options = ["--dataset", f"points={tmp_path / name}.npz", "--id", name]
            options += ["--roster", str(roster), "--roster-owner", keys["owner"]]
            options += ["--key", f"{tmp_path / name}.key", "--journal", f"{tmp_path / name}.log"]
            urls.append(stack.enter_context(worker_process(*options))["url"])
        yield urls


@pytest.mark.processes
async def test_processes_add_up(
    tmp_path: Path, roster: Path, keys: dict[str, str], clinics: list[str]
) -> None:
    models = [nn.Linear(4, 2), nn.Linear(4, 2)]
    models[1].load_state_dict(models[0].state_dict())
    pinned = await asyncio.to_thread(lambda: load_roster(roster).check(keys["owner"]))
    for model, privacy in zip(models, (None, federated.SecAgg(pinned)), strict=True):
        await federated.fit(
            model,
            [partial(wsfed.connect, url) for url in clinics],
            "points",
            F.cross_entropy,
            partial(torch.optim.SGD, lr=0.1),
            rounds=2,
            privacy=privacy,
        )
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    notes = [json.loads(each) for each in (tmp_path / "alice.log").read_text().splitlines()]
    assert [entry[0] for entry in notes[1:]] == [
        *("mask", "cohort", "sum", "last"),
        *("mask", "sum", "last"),
    ]
