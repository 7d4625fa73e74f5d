"""Differential privacy: what is clipped, what noise is added, and what it spends."""

from __future__ import annotations

import copy
import math
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import sites
from wsfed import federated
from wsfed.federated.budget import Budget
from wsfed.federated.dp import DP, Noise, follow, release

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
async def workers() -> AsyncIterator[list[wsfed.Worker]]:
    async with sites({f"site-{n}": 40 + 8 * n for n in range(4)}) as made:
        yield made


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


async def fit(model: nn.Module, workers: Sequence[wsfed.Worker], **more: Any) -> federated.History:
    arguments = {"rounds": 1, "batch_size": 8, **more}
    return await federated.fit(model, workers, "points", F.cross_entropy, SGD, **arguments)


def change(model: nn.Module, other: nn.Module) -> torch.Tensor:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return torch.cat([(a - b).double().reshape(-1) for a, b in pairs if a.is_floating_point()])


# --- what is clipped ------------------------------------------------------------------------------


async def test_one_site_changes_no_more_than_the_bound(
    workers: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noise, "add", lambda self, values, deviation: values)
    free, clipped, before = network(), network(), network()
    await fit(free, workers[:1])
    await fit(clipped, workers[:1], privacy=DP(clip=0.05))
    assert change(free, before).norm() > 0.1
    assert float(change(clipped, before).norm()) == pytest.approx(0.05, rel=1e-4)
    direction = change(free, before)
    assert torch.allclose(
        change(clipped, before), direction * (0.05 / direction.norm()), rtol=0, atol=1e-6
    )
    count = clipped.state_dict()["1.num_batches_tracked"]
    assert count == before.state_dict()["1.num_batches_tracked"]


async def test_sites_count_alike(
    workers: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noise, "add", lambda self, values, deviation: values)
    model, before = network(), network()
    await fit(model, workers, privacy=DP(clip=1e6))
    singles = []
    for worker in workers:
        single = network()
        await fit(single, [worker])
        singles.append(change(single, before))
    mean = torch.stack(singles).mean(0)
    assert torch.allclose(change(model, before), mean, rtol=0, atol=1e-6)


# --- what noise is added --------------------------------------------------------------------------


def test_noise_is_that_of_the_formula() -> None:
    given = {"w": torch.zeros(100_000), "count": torch.tensor(7)}
    sums = {"w": torch.full((100_000,), 2.0, dtype=torch.float64)}
    dp = DP(clip=0.5, noise=1.5)
    made = release(dp, Noise(), 0.5, given, sums, 10)
    assert float(made["w"].mean()) == pytest.approx(0.2, abs=5 * 0.075 / 100_000**0.5)
    assert float(made["w"].std()) == pytest.approx(1.5 * 0.5 / 10, rel=0.02)
    assert int(made["count"]) == 7


async def test_no_two_runs_draw_the_same_noise(workers: list[wsfed.Worker]) -> None:
    one, other = network(), network()
    await fit(one, workers, privacy=DP())
    await fit(other, workers, privacy=DP())
    assert change(one, other).abs().min() > 0


# --- what it spends -------------------------------------------------------------------------------


def test_what_is_spent_is_what_the_accountant_says() -> None:
    budget, accountant = Budget(1.1, 1e-5, None), RDPAccountant()
    for _ in range(20):
        accountant.step(noise_multiplier=1.1, sample_rate=0.1)
        spent = budget.spend({"": (0.1, 1)})
    assert spent == accountant.get_epsilon(1e-5)
    # One Gaussian: the best order a for epsilon = a / (2 z^2) + log(1 / delta) / (a - 1).
    once = Budget(4.0, 1e-5, None).spend({"": (1.0, 1)})
    classical = min(a / 32 + math.log(1e5) / (a - 1) for a in [1 + x / 10 for x in range(1, 999)])
    assert once <= classical + 1e-9
    assert once > 0.5 * classical


async def test_the_budget_ends_training(workers: list[wsfed.Worker]) -> None:
    epsilons = [Budget(2.0, 1e-5, None)]
    for _ in range(3):
        epsilons[0].spend({"": (1.0, 1)})
    three = epsilons[0].epsilon()
    history = await fit(network(), workers, rounds=9, privacy=DP(noise=2.0, budget=three + 1e-6))
    assert len(history) == 3
    assert history[-1].metrics["epsilon"] == pytest.approx(three)
    assert "the budget is" in history.stopped


async def test_a_budget_for_no_round_is_told_at_once(workers: list[wsfed.Worker]) -> None:
    model, before = network(), network()
    with pytest.raises(wsfed.PrivacyBudgetSpent, match="another round would spend") as caught:
        await fit(model, workers, privacy=DP(noise=0.5, budget=1.0))
    assert caught.value.budget == 1.0
    assert not change(model, before).any()


async def test_a_resumed_training_has_spent_what_it_had(
    workers: list[wsfed.Worker], tmp_path: Path
) -> None:
    privacy = DP(noise=2.0, quantile=0.5)
    more: dict[str, Any] = {"privacy": privacy, "checkpoint": tmp_path}
    await fit(network(), workers, rounds=2, **more)
    history = await fit(network(), workers, rounds=4, resume=True, **more)
    budget = Budget(2.0, 1e-5, None)
    assert history.series("epsilon") == [budget.spend({"": (1.0, 1)}) for _ in range(4)]


async def test_poisson_samples_spend_less(workers: list[wsfed.Worker]) -> None:
    sampler = federated.Poisson(0.9)
    everyone = await fit(network(), workers, rounds=2, privacy=DP(noise=2.0))
    sampled = await fit(network(), workers, rounds=2, privacy=DP(noise=2.0), sampler=sampler)
    uniform = federated.Uniform(fraction=0.9)
    drawn = await fit(network(), workers, rounds=2, privacy=DP(noise=2.0), sampler=uniform)
    assert sampled[-1].metrics["epsilon"] < everyone[-1].metrics["epsilon"]
    assert drawn[-1].metrics["epsilon"] == everyone[-1].metrics["epsilon"]


# --- a bound that adapts --------------------------------------------------------------------------


def test_the_bound_finds_the_quantile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "number", lambda self, deviation: 0.0)
    norms = torch.linspace(1, 9, 200)
    dp, clip = DP(quantile=0.25, rate=0.5), 0.1
    for _ in range(100):
        clip = follow(dp, Noise(), clip, (norms <= clip).tolist(), 200)
    assert clip == pytest.approx(3.0, rel=0.05)
    assert follow(DP(), Noise(), 0.7, [True], 1) == 0.7


def test_part_of_the_guarantee_goes_to_the_count() -> None:
    dp = DP(noise=1.0, quantile=0.5, count_noise=2.0)
    z = dp.noise_on_values
    assert z > 1.0
    assert z**-2 + (2 * 2.0) ** -2 == pytest.approx(1.0)


async def test_the_bound_goes_with_the_training(workers: list[wsfed.Worker]) -> None:
    strategy = federated.FedAvgM()
    conclude = strategy.conclude

    def looking(state: Any, memory: Any, mean: Any, buffers: Any = ()) -> Any:
        assert not any(name.startswith("privacy") for name in memory)
        return conclude(state, memory, mean, buffers)

    strategy.conclude = looking  # type: ignore[method-assign]
    before = copy.deepcopy(network())
    model = network()
    await fit(
        model,
        workers,
        rounds=3,
        strategy=strategy,
        privacy=DP(clip=1e-6, quantile=0.9, rate=5.0, noise=0.1, count_noise=0.06),
    )
    # Nobody is within so small a bound, so it grew, and so did the change.
    assert change(model, before).norm() > 1e-5


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"clip": 0},
        {"noise": 0},
        {"delta": 1},
        {"budget": 0},
        {"quantile": 1.5},
        {"quantile": 0.5, "noise": 3.0, "count_noise": 1.5},
        {"clip": math.nan},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"positive|between"):
        DP(**more)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"strategy": federated.Krum(1)}, "which Krum needs"),
        ({"strategy": federated.FedSGD()}, "FedSGD has none"),
        ({"schedule": "sequential"}, "train at once"),
    ],
    ids=str,
)
async def test_what_does_not_go_together_is_refused(
    workers: list[wsfed.Worker], more: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        await fit(network(), workers, privacy=DP(), **more)
