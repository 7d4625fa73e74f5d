"""``wsfed worker --releases``: what is refused to start, and what a process lets leave."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import wsfed
from tests.federated.rows import points
from wsfed import federated
from wsfed.cli import app
from wsfed.errors import GetNotPermitted
from wsfed.testing import worker_process


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--releases", "clip=0"], "positive"),
        (["--releases", "norm=1"], "is not clip=NORM"),
        (["--releases", "budget=8"], "needs --ledger"),
        (["--ledger", "ledger.json"], "goes with --releases"),
    ],
)
def test_rules_that_do_not_go_together(options: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["worker", *options], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert says in done.output


def test_a_damaged_ledger_is_told(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text("[]")
    options = ["--releases", "budget=8", "--ledger", str(tmp_path / "ledger.json")]
    done = CliRunner().invoke(app, ["worker", *options], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 1
    assert "is no ledger" in done.output


@pytest.mark.processes
@pytest.mark.blocking
async def test_a_strict_process_trains_and_notes_what_it_spends(tmp_path: Path) -> None:
    np.savez(tmp_path / "points.npz", **{name: v.numpy() for name, v in points(60, 1).items()})
    rules = ["--releases", "clip=1,noise=2,budget=100", "--ledger", str(tmp_path / "ledger.json")]
    data = ["--dataset", f"points={tmp_path}/points.npz"]
    with worker_process(*rules, *data, "--id", "clinic") as told:
        async with wsfed.connect(told["url"]) as clinic:
            model = nn.Linear(4, 2)
            sgd = partial(torch.optim.SGD, lr=0.1)
            await federated.fit(model, [clinic], "points", F.cross_entropy, sgd, rounds=2)
            x, _ = (await clinic.dataset("points")).batch(60, 0)
            with pytest.raises(GetNotPermitted, match="nothing leave but changes"):
                await x.sum()
    assert json.loads((tmp_path / "ledger.json").read_text()) == {"points": [[2.0, 2]]}
