"""What a worker has already is not sent again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import points, sites
from wsfed import federated
from wsfed.federated.broadcast import Broadcast
from wsfed.federated.compression import Cast
from wsfed.federated.network import Network, Setup
from wsfed.federated.recipe import Criterion, Recipe
from wsfed.federated.state import state_of
from wsfed.tensors import hash_of

SGD = partial(torch.optim.SGD, lr=0.1)
#: Bytes of commands, plans and replies of a round at most; a wide layer has 160,000.
FEW = 6000


def wide() -> nn.Module:
    """Layers of 4,000, 160,800 and 1,608 bytes."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 200), nn.Linear(200, 2))


WHOLE = sum(value.nbytes for value in wide().state_dict().values())


@pytest.fixture
async def workers() -> AsyncIterator[list[wsfed.Worker]]:
    async with sites({"alice": 40, "bob": 40}, {"alice": 20, "bob": 20}) as made:
        yield made


async def sent(
    model: nn.Module, workers: list[wsfed.Worker], optimizer: Any = SGD, **more: Any
) -> list[int]:
    """Bytes to the first worker in each of three rounds."""
    history = await federated.fit(
        *(model, workers, "points", F.cross_entropy, optimizer), rounds=3, **more
    )
    return [next(s.bytes_up for s in told.sites if s.site == "alice") for told in history]


# --- in training ----------------------------------------------------------------------------------


async def test_what_is_frozen_travels_once(workers: list[wsfed.Worker]) -> None:
    model = wide()
    model[2].requires_grad_(False)
    rest = WHOLE - sum(value.nbytes for value in model[2].state_dict().values())
    _, second, third = await sent(model, workers)
    assert rest < second < rest + FEW
    assert rest < third < rest + FEW


async def test_what_training_leaves_as_it_is_travels_once(workers: list[wsfed.Worker]) -> None:
    def last(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters)[-2:], lr=0.1)

    _, second, third = await sent(wide(), workers, last)
    assert 1608 < second < 1608 + FEW
    assert 1608 < third < 1608 + FEW


async def test_what_training_leaves_as_it_is_travels_once_cast_too(
    workers: list[wsfed.Worker],
) -> None:
    def last(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters)[-2:], lr=0.1)

    _, second, third = await sent(wide(), workers, last, compression="bf16")
    assert 804 < second < 804 + FEW
    assert 804 < third < 804 + FEW


async def test_the_first_round_begins_with_the_model_that_was_set_up(
    workers: list[wsfed.Worker],
) -> None:
    before = workers[0].traffic[0]
    await federated.fit(*(wide(), workers, "points", F.cross_entropy, SGD), rounds=1)
    assert WHOLE < workers[0].traffic[0] - before < WHOLE + 2 * FEW


@pytest.mark.parametrize("schedule", ["concurrent", "sequential"])
async def test_a_site_alone_goes_on_from_what_it_has_left(
    workers: list[wsfed.Worker], schedule: Any
) -> None:
    _, second, third = await sent(wide(), workers[:1], schedule=schedule, validation="held-out")
    assert second < FEW
    assert third < FEW


async def test_sites_of_one_worker_hand_the_model_on_there() -> None:
    shards = [wsfed.Dataset(f"shard-{number}", points(40, number)) for number in range(3)]
    async with wsfed.VirtualWorker("alice", datasets=shards) as alice:
        history = await federated.fit(
            *(wide(), [alice], "shard-*", F.cross_entropy, SGD), rounds=2, schedule="sequential"
        )
    assert sum(site.bytes_up for site in history[1].sites) < 2 * FEW


async def test_what_was_evaluated_is_not_sent_again_to_be_trained(
    workers: list[wsfed.Worker],
) -> None:
    _, second, third = await sent(wide(), workers, validation="held-out")
    assert WHOLE < second < WHOLE + FEW  # the model of the round before, for its evaluation
    assert WHOLE < third < WHOLE + FEW


async def test_a_model_that_was_given_is_evaluated_without_being_sent(
    workers: list[wsfed.Worker],
) -> None:
    model = wide()
    setup = Setup("points", "held-out", Recipe(Criterion(F.cross_entropy), SGD))
    async with Network(workers[:1], model, setup) as network:
        (site,) = network.sites
        state = {name: value.detach() + 1 for name, value in state_of(model).items()}
        counted = [workers[0].traffic[0]]
        for _ in range(3):
            told = await site.judge(state)
            counted.append(workers[0].traffic[0])
            state = {name: value.clone() for name, value in state.items()}  # equal, not the same
    first, *again = (after - before for before, after in pairwise(counted))
    assert first > WHOLE
    assert max(again) < 1000
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            value.copy_(state[name])
    rows = points(20, 50)
    assert told["loss"] == pytest.approx(F.cross_entropy(model(rows["x"]), rows["y"]).item())


async def test_a_value_that_is_written_to_is_sent_again(workers: list[wsfed.Worker]) -> None:
    model = wide()
    setup = Setup("points", "held-out", Recipe(Criterion(F.cross_entropy), SGD))
    async with Network(workers[:1], model, setup) as network:
        (site,) = network.sites
        state = {name: value.detach().clone() for name, value in state_of(model).items()}
        network.broadcast.prepare(state)
        before = await site.judge(state)
        state["3.weight"].zero_()
        state["3.bias"].zero_()
        after = await site.judge(state)
    assert before["loss"] != after["loss"]
    assert after["loss"] == pytest.approx(torch.tensor(2.0).log().item())


async def test_what_a_strategy_changes_in_place_is_sent(workers: list[wsfed.Worker]) -> None:
    class Halving(federated.FedAvg):
        def step(self, state: Any, memory: Any, mean: Any) -> Any:
            for value in mean.values():
                value.mul_(0.5)
            return mean, memory

    model, still = wide(), partial(torch.optim.SGD, lr=0.0)
    start = model[2].weight.detach().clone()
    await federated.fit(
        *(model, workers[:1], "points", F.cross_entropy, still), rounds=3, strategy=Halving()
    )
    assert torch.equal(model[2].weight, start / 8)


async def test_late_words_about_an_earlier_turn_are_not_believed(
    workers: list[wsfed.Worker],
) -> None:
    model = wide()
    setup = Setup("points", None, Recipe(Criterion(F.cross_entropy), SGD))
    async with Network(workers[:1], model, setup) as network:
        replica = network.sites[0]._replica
        one, other = (
            {name: value.detach() + more for name, value in state_of(model).items()}
            for more in (1, 2)
        )
        replica.give(one, federated.LocalTerms())
        turn = replica.turn
        replica.give(other, federated.LocalTerms())
        replica.remember(network.broadcast.digests(one), turn)
        replica.give(one, federated.LocalTerms())
        values = replica.named(await replica.ask().values, one)
    assert all(torch.equal(values[name], value) for name, value in one.items())


# --- what goes out --------------------------------------------------------------------------------


def test_a_part_is_told_by_its_content() -> None:
    broadcast, value = Broadcast(None, frozenset()), torch.ones(3)
    part = broadcast.part("w", value)
    assert part.digest == hash_of([torch.ones(3)]) == broadcast.part("w", value.clone()).digest
    assert part.cast is None
    for other in (torch.ones(3, 1), torch.ones(3).double(), torch.zeros(3)):
        assert broadcast.part("w", other).digest != part.digest
    zero = broadcast.part("w", torch.zeros(3)).digest
    assert broadcast.part("w", -torch.zeros(3)).digest != zero


def test_a_model_is_cast_once_for_all_workers() -> None:
    broadcast = Broadcast(Cast("bf16"), frozenset(["mean"]))
    state = {"w": torch.randn(3), "mean": torch.randn(3), "count": torch.tensor(3)}
    broadcast.prepare(state)
    part = broadcast.part("w", state["w"])
    assert part.cast is not None
    assert torch.equal(part.cast, state["w"].bfloat16())
    assert broadcast.part("w", state["w"]) is part
    assert broadcast.part("mean", state["mean"]).cast is None
    assert broadcast.part("count", state["count"]).cast is None
    state["w"].add_(1)
    assert broadcast.part("w", state["w"]).digest != part.digest


def test_a_model_is_not_kept_for_its_digests() -> None:
    broadcast, value = Broadcast(None, frozenset()), torch.ones(3)
    broadcast.prepare({"w": value})
    gone = weakref.ref(value)
    del value
    gc.collect()
    assert gone() is None


def test_tensors_of_inference_have_parts_too() -> None:
    with torch.inference_mode():
        value = torch.ones(3)
    broadcast = Broadcast(None, frozenset())
    broadcast.prepare({"w": value})
    assert broadcast.part("w", value).digest == hash_of([torch.ones(3)])
