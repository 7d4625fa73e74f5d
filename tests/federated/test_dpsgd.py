"""DP-SGD: what is clipped by row, what noise is added, how rows are taken, and what it spends."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import points, sites
from wsfed import federated
from wsfed.client.dataset import capacity
from wsfed.errors import FederatedError
from wsfed.federated import DPSGD
from wsfed.federated.dpsgd import Sampling, private_gradients
from wsfed.worker.datasets import Dataset

SGD = partial(torch.optim.SGD, lr=0.5)
SILENT = 1e-9


@pytest.fixture
async def workers() -> AsyncIterator[list[wsfed.Worker]]:
    async with sites({f"site-{n}": 40 + 40 * n for n in range(3)}) as made:
        yield made


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


async def fit(model: nn.Module, workers: Sequence[wsfed.Worker], **more: Any) -> federated.History:
    arguments = {"rounds": 1, "batch_size": 8, "privacy": DPSGD(), **more}
    return await federated.fit(model, workers, "points", F.cross_entropy, SGD, **arguments)


def values(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().double().reshape(-1) for each in model.parameters()])


# --- one step -------------------------------------------------------------------------------------


def clipped(model: nn.Module, clip: float, weights: Sequence[float]) -> list[torch.Tensor]:
    """The sum of algorithm 1, row by row."""
    rows = points(len(weights), 5)
    sums = [torch.zeros_like(each) for each in model.parameters()]
    for number, weight in enumerate(weights):
        loss = objective(model, rows["x"][number : number + 1], rows["y"][number : number + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([each.reshape(-1) for each in gradients]).norm()
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient * min(1.0, clip / float(norm)) * weight
    return sums


@pytest.mark.parametrize("clip", [0.05, 0.5, 1e6])
def test_each_row_is_clipped_by_itself(clip: float) -> None:
    model, rows = network(), points(6, 5)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    settings = DPSGD(clip=clip, noise=SILENT / clip)
    private_gradients(settings, model, objective, list(rows.values()), weights, expected=3)
    expected = [each / 3 for each in clipped(model, clip, weights.tolist())]
    torch.testing.assert_close([each.grad for each in model.parameters()], expected)


def test_the_noise_is_as_large_as_it_is_said_to_be() -> None:
    model, rows = network(), points(6, 5)
    fields, weights = list(rows.values()), torch.ones(6)
    sums = torch.cat([each.reshape(-1) for each in clipped(model, 0.5, [1.0] * 6)])
    drawn = []
    for _ in range(200):
        private_gradients(DPSGD(clip=0.5, noise=3.0), model, objective, fields, weights, expected=2)
        made = torch.cat([each.grad.reshape(-1) for each in model.parameters()])
        drawn.append(made * 2 - sums)
    noise = torch.stack(drawn)
    assert float(noise.std()) == pytest.approx(1.5, rel=0.03)
    assert abs(float(noise.mean())) < 0.05


# --- rows -----------------------------------------------------------------------------------------


def test_each_row_is_taken_with_the_same_probability() -> None:
    data = Dataset("points", {"row": torch.arange(100)})
    generator, counts, sizes = np.random.default_rng(0), torch.zeros(100), []
    size = capacity(100, 0.1)
    for _ in range(2000):
        rows, weights = data.sample(0.1, size, generator)
        assert rows.shape == weights.shape == (size,)
        taken = rows[weights == 1]
        assert len(set(taken.tolist())) == len(taken)
        assert set(rows.tolist()) == set(taken.tolist()) or not len(taken)
        counts[taken] += 1
        sizes.append(len(taken))
    assert float(counts.mean()) == pytest.approx(200, rel=0.02)
    # Binomial, of 2,000: five standard deviations of 13.4 hold for all of 100 rows.
    assert counts.min() > 200 - 67
    assert counts.max() < 200 + 67
    assert float(np.var(sizes)) == pytest.approx(100 * 0.1 * 0.9, rel=0.15)


def test_a_batch_that_is_too_small_holds_some_of_what_was_taken() -> None:
    data, generator = Dataset("points", {"row": torch.arange(10)}), np.random.default_rng(0)
    rows, weights = data.sample(1.0, 4, generator)
    assert len(set(rows.tolist())) == 4
    assert weights.tolist() == [1.0] * 4
    rows, weights = data.sample(1e-9, 4, generator)
    assert rows.tolist() == [0] * 4
    assert weights.tolist() == [0.0] * 4
    with pytest.raises(IndexError, match="make no batch of 11"):
        data.sample(0.5, 11, generator)


def test_a_batch_holds_what_is_taken() -> None:
    """Hoeffding's bound would need more; this is Bernstein's, below 1e-9 wherever there is room."""
    for rows in (50, 1000, 10**6):
        for rate in (1e-4, 0.01, 0.3):
            mean, size = rows * rate, capacity(rows, rate)
            beyond = size - mean
            bound = np.exp(-(beyond**2) / (2 * (mean * (1 - rate) + beyond / 3)))
            assert size == rows or bound < 1e-9
    assert capacity(40, 1.0) == 40


async def test_runs_over_samples_give_rows_and_weights(workers: list[wsfed.Worker]) -> None:
    data = await workers[2].dataset("points")
    counted = wsfed.plan(lambda x, y, weights: (weights.sum(), (weights * 0 + 1).sum()))
    taken, given = await data.run(counted, sample_rate=0.25, steps=40)
    assert given.tolist() == [capacity(120, 0.25)] * 40
    assert 20 < float(taken.mean()) < 40
    assert len(set(taken.tolist())) > 4
    everything, _ = await data.run(counted, sample_rate=1.0, steps=2)
    assert everything.tolist() == [120.0, 120.0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sample_rate": 0.5}, "steps"),
        ({"steps": 3}, "rate"),
        ({"sample_rate": 1.5, "steps": 3}, "above 0, at most 1"),
        ({"sample_rate": 0.5, "steps": 3, "shuffle": True}, "take the place"),
        ({"sample_rate": 0.5, "steps": 3, "batch_size": 3}, "take the place"),
        ({}, "batch_size, or a sample_rate"),
    ],
)
async def test_settings_of_a_run_that_do_not_go_together(
    workers: list[wsfed.Worker], settings: dict[str, Any], text: str
) -> None:
    data = await workers[0].dataset("points")
    with pytest.raises(ValueError, match=text):
        data.run(wsfed.plan(lambda *batch: batch[0].sum()), **settings)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Optimal order is the smallest alpha")  # so little noise
async def test_without_noise_it_is_clipped_training(workers: list[wsfed.Worker]) -> None:
    """All rows in each step, in whatever order: the same as in plain torch."""
    model, local = network(), network()
    privacy = DPSGD(clip=0.1, noise=SILENT)
    await fit(model, workers[:1], batch_size=None, local_epochs=3, privacy=privacy)
    rows = points(40, 0)
    optimizer = SGD(local.parameters())
    for _ in range(3):
        private_gradients(privacy, local, objective, list(rows.values()), torch.ones(40), 40)
        optimizer.step()
    torch.testing.assert_close(values(model), values(local))


async def test_noise_cannot_be_foreseen(workers: list[wsfed.Worker]) -> None:
    one, other = network(), network()
    for model in (one, other):
        workers[0].manual_seed(7)
        await fit(model, workers[:1], batch_size=None)
    assert (values(one) - values(other)).abs().min() > 0


async def test_it_learns(workers: list[wsfed.Worker]) -> None:
    held = points(500, 99)
    model = network()
    await fit(model, workers, rounds=15, local_epochs=2, privacy=DPSGD(noise=0.8))
    accuracy = (model(held["x"]).argmax(1) == held["y"]).double().mean()
    assert accuracy > 0.85


async def test_rounds_of_every_kind(workers: list[wsfed.Worker]) -> None:
    for more in (
        {"schedule": "sequential"},
        {"schedule": "async"},
        {"strategy": federated.FedProx(0.1)},
        {"strategy": federated.Scaffold(lr=0.5, sites=3)},
        {"strategy": federated.FedMedian()},
        {"privacy": [DPSGD(), federated.DP()]},
    ):
        history = await fit(network(), workers, rounds=2, **more)
        assert history[-1].metrics["row_epsilon"] > history[0].metrics["row_epsilon"]
    assert history[-1].metrics["epsilon"] > 0


# --- what it spends -------------------------------------------------------------------------------


def spent(rows: int, rounds: int, noise: float = 1.0, batch: int = 8) -> float:
    accountant, sampling = RDPAccountant(), Sampling.of(rows, batch, 1)
    for _ in range(rounds * sampling.steps):
        accountant.step(noise_multiplier=noise, sample_rate=sampling.rate)
    return float(accountant.get_epsilon(1e-5))


async def test_what_is_spent_is_what_the_accountant_says(workers: list[wsfed.Worker]) -> None:
    assert Sampling.of(40, 8, 1) == Sampling(0.2, 5)
    assert Sampling.of(40, 16, 2) == Sampling(0.4, 6)
    assert Sampling.of(10, 16, 2) == Sampling.of(10, None, 2) == Sampling(1.0, 2)
    history = await fit(network(), workers, rounds=3)
    # The site with the fewest rows: its rows are taken most often.
    assert history.series("row_epsilon") == pytest.approx([spent(40, n) for n in (1, 2, 3)])
    assert spent(40, 3) > spent(120, 3)


async def test_the_budget_ends_training(workers: list[wsfed.Worker]) -> None:
    privacy = DPSGD(budget=spent(40, 2) + 1e-6)
    history = await fit(network(), workers, rounds=9, privacy=privacy)
    assert len(history) == 2
    assert "the budget is" in history.stopped
    with pytest.raises(wsfed.PrivacyBudgetSpent, match="another round"):
        await fit(network(), workers, privacy=DPSGD(budget=0.01))


async def test_a_resumed_training_has_spent_what_it_had(
    workers: list[wsfed.Worker], tmp_path: Path
) -> None:
    await fit(network(), workers, rounds=2, checkpoint=tmp_path)
    history = await fit(network(), workers, rounds=3, checkpoint=tmp_path, resume=True)
    assert history.series("row_epsilon") == pytest.approx([spent(40, n) for n in (1, 2, 3)])


# --- what is refused ------------------------------------------------------------------------------


async def test_what_cannot_be_private_is_told_at_once(workers: list[wsfed.Worker]) -> None:
    mixing = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = copy.deepcopy(mixing)
    with pytest.raises(FederatedError, match="BatchNorm"):
        await fit(mixing, workers)
    assert torch.equal(values(mixing), values(before))
    for strategy in (federated.FedSGD(), federated.QFedAvg()):
        with pytest.raises(ValueError, match=strategy.name):
            await fit(network(), workers, strategy=strategy)
    for privacy in ([DPSGD(), DPSGD()], [DPSGD(), "dp"], [federated.DP(), federated.DP()]):
        with pytest.raises(ValueError, match="a list of one"):
            await fit(network(), workers, privacy=privacy)
    for wrong in ({"clip": 0.0}, {"noise": -1.0}, {"delta": 1.0}, {"budget": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            DPSGD(**wrong)
