"""What a curious client restores of private rows: from plain averages a lot, else none.

An attack that cannot succeed proves nothing, so each one first succeeds.

The attack is the closed form for a linear layer with a bias (Geiping et al. 2020, proposition 3.1):
the gradient of one row is ``gW = gb x^T``, so ``gW[i] / gb[i]`` is the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from wsfed import federated
from wsfed.privacy.roster import Membership, Roster, new_key, public_key

SITES, FEATURES = 10, 784
NAMES = tuple(f"site-{number}" for number in range(SITES))
KEYS = {name: new_key() for name in NAMES}


def rows_of(number: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.rand(rows, FEATURES, generator=generator)
    return {"x": x, "y": torch.randint(10, (rows,), generator=generator)}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 10))


def restored(weight: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor) -> int:
    """Rows that the change of a layer's weight and bias gives away, within one per cent."""
    there = bias.abs() > 1e-12
    candidates = weight[there].double() / bias[there].double()[:, None]
    if not len(candidates):
        return 0
    errors = torch.cdist(rows.double(), candidates) / rows.double().norm(dim=1, keepdim=True)
    return int((errors.min(dim=1).values < 0.01).sum())


class _Curious(federated.FedSGD):
    """Keeps every reply that it is shown, as a client that follows the protocol can."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.seen: list[Any] = []
        self.means: list[Any] = []

    def weight(self, rows: int) -> float:
        return float(rows)

    def conclude(self, state: Any, memory: Any, mean: Any, buffers: Any = ()) -> Any:
        self.means.append(mean)
        return super().conclude(state, memory, mean, buffers)


async def attack(
    strategy: federated.Strategy,
    rows: int,
    sites: int,
    roster: Roster | None = None,
    model: nn.Module | None = None,
    most_alike: float = 0.01,
    **more: Any,
) -> list[torch.Tensor]:
    """Train one round; gives the rows of all sites."""
    async with AsyncExitStack() as stack:
        workers = []
        for number, name in enumerate(NAMES[:sites]):
            data = wsfed.Dataset("points", rows_of(number, rows))
            membership = None
            if roster is not None:
                membership = Membership(name, KEYS[name], roster, most_alike=most_alike)
            worker = wsfed.VirtualWorker(name, datasets=[data], membership=membership)
            workers.append(await stack.enter_async_context(worker))
        await federated.fit(
            model or network(),
            workers,
            "points",
            F.cross_entropy,
            partial(torch.optim.SGD, lr=0.1),
            rounds=1,
            batch_size=None,
            strategy=strategy,
            **more,
        )
    return [rows_of(number, rows)["x"] for number in range(sites)]


def of_first_layer(state: Any) -> Sequence[torch.Tensor]:
    return state["0.weight"], state["0.bias"]


def a_roster(bound: float, noise: float = 0.0) -> Roster:
    public = {name: public_key(key) for name, key in KEYS.items()}
    return Roster("attacked", 1, public, min_rows=1, bound=bound, noise=noise)


@pytest.mark.parametrize(("rows", "least"), [(1, 1), (4, 3)])
async def test_a_gradient_gives_rows_away(rows: int, least: int) -> None:
    curious = _Curious()
    (x,) = await attack(curious, rows, 1)
    assert restored(*of_first_layer(curious.means[0]), x) >= least


async def test_a_change_of_one_step_is_a_gradient() -> None:
    seen: list[Any] = []

    class Looking(federated.FedAvg):
        def step(self, state: Any, memory: Any, mean: Any) -> Any:
            seen.append({name: state[name] - mean[name] for name in state})
            return super().step(state, memory, mean)

    (x,) = await attack(Looking(), 1, 1)
    assert restored(*of_first_layer(seen[0]), x) == 1


async def test_even_the_mean_over_ten_sites_of_one_row_gives_most_of_them_away() -> None:
    """Averaging alone does not protect: what one neuron alone has seen stands in the mean."""
    curious = _Curious()
    rows = await attack(curious, 1, SITES)
    assert sum(restored(*of_first_layer(curious.means[0]), x) for x in rows) >= 5


@pytest.mark.parametrize("rows", [1, 32])
async def test_secure_aggregation_alone_hides_single_replies_and_not_what_is_in_the_sum(
    rows: int,
) -> None:
    """Where one row alone makes a neuron fire, the sum gives it away: hence noise."""
    curious, roster = _Curious(), a_roster(1e3)
    x = await attack(curious, rows, SITES, roster, privacy=federated.SecAgg(roster))
    assert sum(restored(*of_first_layer(curious.means[0]), each) for each in x) >= 1


@pytest.mark.parametrize("rows", [1, 32])
async def test_a_secure_sum_with_noise_gives_none_away(rows: int) -> None:
    curious, roster = _Curious(), a_roster(1.0, noise=0.01)
    x = await attack(curious, rows, SITES, roster, privacy=federated.SecAgg(roster))
    assert sum(restored(*of_first_layer(curious.means[0]), each) for each in x) == 0


def imprint() -> nn.Module:
    """Measures how bright a row is; each neuron fires from another brightness on.

    The malicious layer of Fowl et al. 2022, *Robbing the fed*, section 4.
    """
    model = network()
    places = (torch.arange(256) + 0.5) / 256
    of_normal = 2**0.5 * torch.erfinv(2 * places - 1)  # uniform pixels: mean 1/2, variance 1/12
    with torch.no_grad():
        model[0].weight.fill_(1 / FEATURES)
        model[0].bias.copy_(-(0.5 + of_normal * (1 / 12 / FEATURES) ** 0.5))
        model[2].weight.copy_(torch.linspace(-1, 1, 10)[:, None].expand(10, 256))
    return model


def between(state: Any) -> Sequence[torch.Tensor]:
    """Differences of neighbouring neurons: what one fires for and the next does not."""
    weight, bias = of_first_layer(state)
    return weight[:-1] - weight[1:], bias[:-1] - bias[1:]


async def test_an_imprint_layer_gives_rows_away_in_plain_and_in_secure_sums() -> None:
    """Where owners do not look at layers: the attack succeeds on the sum over ten sites."""
    roster = a_roster(1e3)
    for more in (
        {},
        {"roster": roster, "privacy": federated.SecAgg(roster), "most_alike": 1.0},
    ):
        curious = _Curious()
        rows = await attack(curious, 8, SITES, model=imprint(), **more)
        assert sum(restored(*between(curious.means[0]), x) for x in rows) >= 40  # of 80


async def test_an_imprint_layer_is_refused_before_any_secret_is_made() -> None:
    curious, roster = _Curious(), a_roster(1e3)
    with pytest.raises(wsfed.SecAggAborted, match=r"100% of the rows are alike"):
        await attack(curious, 8, SITES, roster, model=imprint(), privacy=federated.SecAgg(roster))
    assert not curious.means


async def test_a_structure_that_is_not_the_rosters_is_refused() -> None:
    """A wider layer than agreed would restore more rows."""
    roster = replace(a_roster(1e3), arch_hash=federated.arch_hash(network()))
    await attack(_Curious(), 8, SITES, roster, privacy=federated.SecAgg(roster))
    wide = nn.Sequential(nn.Linear(FEATURES, 512), nn.ReLU(), nn.Linear(512, 10))
    curious = _Curious()
    with pytest.raises(wsfed.SecAggAborted, match="another structure than the roster's"):
        await attack(curious, 8, SITES, roster, model=wide, privacy=federated.SecAgg(roster))
    assert not curious.means


async def _words_used(roster: Roster) -> int:
    """Rows of an embedding that the change of the mean tells of; one site alone has word 7."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    async with AsyncExitStack() as stack:
        workers = []
        for number, name in enumerate(NAMES[:5]):
            words = torch.full((32, 1), 7 if number == 2 else 3)
            data = wsfed.Dataset("words", {"x": words, "y": torch.arange(32) % 2})
            worker = wsfed.VirtualWorker(
                name, datasets=[data], membership=Membership(name, KEYS[name], roster)
            )
            workers.append(await stack.enter_async_context(worker))
        await federated.fit(
            *(model, workers, "words", F.cross_entropy, partial(torch.optim.SGD, lr=0.5)),
            rounds=1,
            privacy=federated.SecAgg(roster),
        )
    return int((model[0].weight.detach() - before).abs().gt(1e-6).any(dim=1).sum())


async def test_a_sum_tells_which_words_a_site_has_and_noise_on_all_of_them_hides_it() -> None:
    assert await _words_used(a_roster(1.0)) == 2
    assert await _words_used(a_roster(1.0, noise=0.01)) == 50


async def test_noise_and_clipping_give_none_away() -> None:
    """Even for one row a site, where the plain mean gives most of them away."""
    seen: list[Any] = []

    class Looking(federated.FedAvg):
        def step(self, state: Any, memory: Any, mean: Any) -> Any:
            seen.append({name: state[name] - mean[name] for name in state})
            return super().step(state, memory, mean)

    rows = await attack(Looking(), 1, SITES, privacy=federated.DP(clip=0.1, noise=1.0))
    assert sum(restored(*of_first_layer(seen[0]), x) for x in rows) == 0
