"""Training over many workers is what its parts are, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import Killed, KilledAfter, points, sites
from wsfed import federated
from wsfed.federated.recipe import Recipe

SGD = partial(torch.optim.SGD, lr=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)
    )


def accuracy(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == y).float().mean()


@pytest.fixture
async def workers() -> AsyncIterator[list[wsfed.Worker]]:
    async with sites(
        {"alice": 40, "bob": 48, "carol": 56}, {"alice": 20, "bob": 21, "carol": 22}
    ) as made:
        yield made


def trained_here(
    model: nn.Module,
    rows: dict[str, torch.Tensor],
    make: Callable[..., torch.optim.Optimizer],
    *,
    site: str,
    round: int,
    epochs: int,
    batch_size: int,
) -> float:
    """What a site does in a round, in plain torch; gives the mean loss."""
    recipe = Recipe(F.cross_entropy, make, epochs=epochs)
    optimizer, total = make(model.parameters()), 0.0
    torch.manual_seed(recipe.draws(site, round))
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(recipe.orders(site, round) + epoch)
        for index in torch.randperm(len(rows["x"]), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(rows["x"][index]), rows["y"][index])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
    return total / len(rows["x"]) / epochs


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


# --- equal to what it stands for -----------------------------------------------------------------


@pytest.mark.parametrize("make", [SGD, MOMENTUM, ADAM], ids=["SGD", "momentum", "Adam"])
@pytest.mark.parametrize("schedule", ["concurrent", "sequential"])
async def test_one_worker_is_plain_torch(
    workers: list[wsfed.Worker], schedule: Any, make: Callable[..., torch.optim.Optimizer]
) -> None:
    model, local = network(), network()
    history = await federated.fit(
        *(model, workers[:1], "points", F.cross_entropy, make),
        rounds=3,
        local_epochs=2,
        batch_size=16,
        schedule=schedule,
    )
    for number in (1, 2, 3):
        loss = trained_here(
            *(local, points(40, 0), make), site="alice", round=number, epochs=2, batch_size=16
        )
        assert history[number - 1].loss == pytest.approx(loss, rel=1e-12)
    assert_equal(model, local)


async def test_rounds_are_the_mean_of_plain_torch(workers: list[wsfed.Worker]) -> None:
    model, local = network(), network()
    await federated.fit(
        *(model, workers, "points", F.cross_entropy, MOMENTUM), rounds=2, batch_size=16
    )
    rows = [points(40 + 8 * number, number) for number in range(3)]
    for number in (1, 2):
        copies = [copy.deepcopy(local) for _ in rows]
        for each, own, site in zip(copies, rows, ("alice", "bob", "carol"), strict=True):
            trained_here(*(each, own, MOMENTUM), site=site, round=number, epochs=1, batch_size=16)
        states = [each.state_dict() for each in copies]
        local.load_state_dict(federated.weighted_mean(states, [40, 48, 56]))
    assert_equal(model, local)


async def test_the_model_travels_in_the_sequential_schedule(workers: list[wsfed.Worker]) -> None:
    model, local = network(), network()
    await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD),
        rounds=2,
        batch_size=16,
        schedule="sequential",
    )
    for number in (1, 2):
        for place, site in enumerate(("alice", "bob", "carol")):
            trained_here(
                *(local, points(40 + 8 * place, place), SGD),
                site=site,
                round=number,
                epochs=1,
                batch_size=16,
            )
    assert_equal(model, local)


async def test_a_loop_by_hand_with_pointers_is_the_same(workers: list[wsfed.Worker]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(4, 2)

    model, by_hand = make(), make()
    await federated.fit(*(model, workers, "points", F.cross_entropy, SGD), rounds=2, batch_size=16)
    recipe = Recipe(F.cross_entropy, SGD)
    for number in (1, 2):
        copies = []
        for worker in workers:
            data = await worker.dataset("points")
            each = worker.send(copy.deepcopy(by_hand))
            optimizer = SGD(each.parameters())
            seed = recipe.orders(worker.id, number)
            for x, y in data.loader(16, shuffle=True, seed=seed):
                optimizer.zero_grad()
                F.cross_entropy(each(x), y).backward()
                optimizer.step()
            copies.append((await wsfed.get(each, grads=False), len(data)))
        states, rows = zip(*((each.state_dict(), count) for each, count in copies), strict=True)
        by_hand.load_state_dict(federated.weighted_mean(states, rows))
    assert_equal(model, by_hand)


async def test_a_round_of_gradients_is_a_step_over_all_rows(workers: list[wsfed.Worker]) -> None:
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    local = copy.deepcopy(model)
    history = await federated.fit(
        *(model, workers, "points", F.cross_entropy), strategy=federated.FedSGD(0.5), rounds=1
    )
    parts = [points(40 + 8 * number, number) for number in range(3)]
    x, y = (torch.cat([part[name] for part in parts]) for name in ("x", "y"))
    loss = F.cross_entropy(local(x), y)
    loss.backward()
    torch.optim.SGD(local.parameters(), lr=0.5).step()
    assert history[0].loss == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(model.parameters(), local.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "strategy",
    [federated.FedProx(0.5), federated.Scaffold(0.1, 3)],
    ids=lambda strategy: strategy.name,
)
async def test_terms_of_a_strategy_are_added_on_the_worker(
    workers: list[wsfed.Worker], strategy: federated.Strategy
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(4, 2)

    model, local = make(), make()
    await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD),
        rounds=3,
        batch_size=16,
        strategy=strategy,
    )
    recipe = Recipe(F.cross_entropy, SGD)
    memory = strategy.begin(local.state_dict())
    for number in (1, 2, 3):
        state = {name: value.clone() for name, value in local.state_dict().items()}
        replies = []
        for place, site in enumerate(("alice", "bob", "carol")):
            each, rows = copy.deepcopy(local), points(40 + 8 * place, place)
            terms, optimizer, steps = strategy.local_terms(memory, site), SGD(each.parameters()), 0
            generator = torch.Generator().manual_seed(recipe.orders(site, number))
            for index in torch.randperm(len(rows["x"]), generator=generator).split(16):
                optimizer.zero_grad()
                F.cross_entropy(each(rows["x"][index]), rows["y"][index]).backward()
                for name, parameter in each.named_parameters():
                    assert parameter.grad is not None
                    parameter.grad += terms.proximal * (parameter.detach() - state[name])
                    parameter.grad += terms.correction.get(name, 0)
                optimizer.step()
                steps += 1
            replies.append(federated.Reply(site, each.state_dict(), len(rows["x"]), steps))
        following, memory = strategy.aggregate(state, memory, replies)
        local.load_state_dict(dict(following))
    for mine, theirs in zip(model.parameters(), local.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


async def test_the_loss_before_training_is_that_of_the_given_model(
    workers: list[wsfed.Worker],
) -> None:
    seen: list[federated.Reply] = []

    class Looking(federated.QFedAvg):
        def aggregate(self, state: Any, memory: Any, replies: Any, buffers: Any = ()) -> Any:
            seen.extend(replies)
            return super().aggregate(state, memory, replies, buffers)

    model = nn.Linear(4, 2)
    local = copy.deepcopy(model)
    await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD), rounds=1, strategy=Looking()
    )
    for place, reply in enumerate(seen):
        rows = points(40 + 8 * place, place)
        assert reply.loss_before == pytest.approx(
            F.cross_entropy(local(rows["x"]), rows["y"]).item(), rel=1e-6
        )


# --- what is trained, and on what -----------------------------------------------------------------


async def test_what_is_frozen_stays_and_does_not_travel(workers: list[wsfed.Worker]) -> None:
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model)
    asked: list[federated.Reply] = []

    class Looking(federated.FedAvg):
        def weight(self, rows: int) -> float:
            return float(rows)

        def conclude(self, state: Any, memory: Any, mean: Any, buffers: Any = ()) -> Any:
            asked.append(mean)
            return super().conclude(state, memory, mean, buffers)

    await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD), rounds=1, strategy=Looking()
    )
    assert not any(name.startswith("0.") for name in asked[0])
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)


async def test_an_objective_takes_the_model_and_the_fields_it_is_given(
    workers: list[wsfed.Worker],
) -> None:
    def objective(model: nn.Module, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    one, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.load_state_dict(one.state_dict())
    await federated.fit(
        *(one, workers, "points", None, SGD), objective=objective, fields=("y", "x"), rounds=1
    )
    await federated.fit(*(other, workers, "points", F.cross_entropy, SGD), rounds=1)
    assert_equal(one, other)


async def test_data_sets_that_fit_a_pattern_are_sites(workers: list[wsfed.Worker]) -> None:
    shards = [wsfed.Dataset(f"shard-{n}", points(20, n)) for n in range(3)]
    async with wsfed.VirtualWorker("dave", datasets=shards) as dave:
        history = await federated.fit(
            *(nn.Linear(4, 2), [dave], "shard-*", F.cross_entropy, SGD), rounds=2
        )
    assert {site.site for site in history[0].sites} == {f"dave/shard-{n}" for n in range(3)}
    assert history[0].rows == 60


async def test_evaluation_on_the_workers_and_here(workers: list[wsfed.Worker]) -> None:
    model = network()
    held_out = [points(20 + number, 50 + number) for number in range(3)]
    x, y = (torch.cat([part[name] for part in held_out]) for name in ("x", "y"))

    def score(judged: nn.Module) -> dict[str, torch.Tensor]:
        assert not judged.training
        return {"central": accuracy(judged(x), y), "central_loss": F.cross_entropy(judged(x), y)}

    history = await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD),
        rounds=3,
        validation="held-out",
        metrics={"accuracy": accuracy},
        evaluate=score,
        evaluate_every=2,
    )
    assert model.training
    assert history[0].metrics == {}
    for each in (history[1], history[2]):
        assert each.metrics["accuracy"] == pytest.approx(each.metrics["central"], abs=1e-6)
        assert each.metrics["eval_loss"] == pytest.approx(each.metrics["central_loss"], rel=1e-5)
        assert all(site.metrics["accuracy"] >= 0 for site in each.sites)


async def test_a_sample_of_the_sites_trains(workers: list[wsfed.Worker]) -> None:
    sampler = federated.Uniform(count=2)
    history = await federated.fit(
        *(nn.Linear(4, 2), workers, "points", F.cross_entropy, SGD), rounds=6, sampler=sampler
    )
    chosen = [frozenset(site.site for site in each.sites) for each in history]
    assert all(len(each) == 2 for each in chosen)
    assert len(set(chosen)) > 1


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [federated.FedAvg(), federated.FedAdam(), federated.Scaffold(0.1, 3), federated.FedAvgM()],
    ids=lambda strategy: strategy.name,
)
async def test_a_training_that_was_killed_goes_on_to_the_same_weights(
    workers: list[wsfed.Worker], tmp_path: Path, strategy: federated.Strategy
) -> None:
    async def fit(model: nn.Module, **more: Any) -> federated.History:
        return await federated.fit(
            *(model, workers, "points", F.cross_entropy, SGD),
            rounds=5,
            strategy=strategy,
            sampler=federated.Uniform(count=2),
            **more,
        )

    whole, killed, resumed = network(), network(), nn.Sequential(*network())
    history = await fit(whole)
    with pytest.raises(Killed):
        await fit(killed, checkpoint=tmp_path, callbacks=[KilledAfter(3)])
    with torch.no_grad():
        resumed[0].weight.zero_()  # it begins with what was saved
    again = await fit(resumed, checkpoint=tmp_path, resume=True)
    assert_equal(resumed, whole)
    assert again.series("loss") == history.series("loss")
    assert [each.number for each in again] == [1, 2, 3, 4, 5]


async def test_a_finished_training_is_not_begun_again_by_mistake(
    workers: list[wsfed.Worker], tmp_path: Path
) -> None:
    arguments = (workers, "points", F.cross_entropy, SGD)
    await federated.fit(nn.Linear(4, 2), *arguments, rounds=1, checkpoint=tmp_path)
    with pytest.raises(wsfed.FederatedError, match="resume=True"):
        await federated.fit(nn.Linear(4, 2), *arguments, rounds=1, checkpoint=tmp_path)
    with pytest.raises(wsfed.FederatedError, match="another model"):
        await federated.fit(nn.Linear(4, 3), *arguments, rounds=1, checkpoint=tmp_path, resume=True)
    with pytest.raises(wsfed.FederatedError, match="seed: 0 then, 1 now"):
        await federated.fit(
            *(nn.Linear(4, 2), *arguments), rounds=1, checkpoint=tmp_path, resume=True, seed=1
        )


async def test_it_ends_when_nothing_gets_better(workers: list[wsfed.Worker]) -> None:
    stop = federated.EarlyStopping("loss", patience=2, by=10.0)
    history = await federated.fit(
        *(nn.Linear(4, 2), workers, "points", F.cross_entropy, SGD), rounds=9, callbacks=[stop]
    )
    assert len(history) == 3
    assert "has not got better for 2 rounds" in history.stopped


async def test_every_batch_is_told(workers: list[wsfed.Worker]) -> None:
    class Listening(federated.Callback):
        def __init__(self) -> None:
            self.batches: list[tuple[str, int, int]] = []

        def batch_done(self, site: str, progress: wsfed.Progress) -> None:
            assert progress.value > 0
            self.batches.append((site, progress.done, progress.total))

    listening = Listening()
    await federated.fit(
        *(nn.Linear(4, 2), workers[:1], "points", F.cross_entropy, SGD),
        rounds=1,
        batch_size=16,
        callbacks=[listening],
    )
    assert listening.batches == [("alice", n, 3) for n in (1, 2, 3)]


# --- asynchronously -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", [federated.FedAsync(), federated.FedBuff(2)], ids=lambda strategy: strategy.name
)
async def test_sites_go_on_at_their_own_pace(
    workers: list[wsfed.Worker], strategy: federated.Strategy
) -> None:
    model = nn.Linear(4, 2)
    history = await federated.fit(
        *(model, workers, "points", F.cross_entropy, SGD),
        rounds=12,
        schedule="async",
        strategy=strategy,
        validation="held-out",
    )
    assert all(
        sum(site.outcome == "used" for site in each.sites) >= strategy.min_replies
        for each in history
    )
    assert any(site.staleness for each in history for site in each.sites)
    assert history[-1].metrics["eval_loss"] < history[0].metrics["eval_loss"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "kind", "says"),
    [
        ({"rounds": 0}, ValueError, "rounds=0"),
        ({"loss": None}, ValueError, "one of them"),
        ({"objective": F.mse_loss}, ValueError, "one of them"),
        ({"optimizer": None}, ValueError, "optimizer is missing"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"local_epochs": 0}, ValueError, "local_epochs"),
        ({"schedule": "parallel"}, ValueError, "concurrent, sequential, async"),
        ({"strategy": "fedavg"}, TypeError, "no strategy"),
        ({"strategy": federated.FedProx(), "schedule": "sequential"}, ValueError, "FedProx"),
        ({"late": "wait"}, ValueError, "'drop' or 'keep'"),
        ({"deadline": 0}, ValueError, "deadline"),
        ({"min_workers": 0}, ValueError, "min_workers"),
        ({"callbacks": [print]}, TypeError, "Callback"),
        ({"resume": True}, ValueError, "checkpoint="),
        ({"workers": []}, wsfed.FederatedError, "no workers"),
        ({"workers": ["ws://127.0.0.1:1"]}, TypeError, "functools.partial"),
        ({"dataset": "scans"}, wsfed.FederatedError, "has no data set 'scans'; it has 'points'"),
        ({"validation": "*"}, None, ""),
        ({"validation": "scans"}, wsfed.FederatedError, "has no data set 'scans'"),
        ({"fields": ["z"]}, wsfed.FederatedError, "no field 'z'"),
        ({"model": nn.ReLU()}, wsfed.FederatedError, "no parameter that requires grad"),
        ({"model": nn.Linear(5, 2)}, RuntimeError, "cannot be multiplied"),
        ({"min_workers": 4}, wsfed.FederatedError, "min_workers=4, and there are 3 sites"),
        ({"strategy": federated.Krum(1)}, wsfed.FederatedError, "Krum needs replies of 5 sites"),
        ({"strategy": federated.Scaffold(0.5, 3)}, ValueError, r"SGD of lr=0\.5 and nothing else"),
        ({"strategy": federated.Scaffold(0.1, 3), "optimizer": MOMENTUM}, ValueError, "else"),
        ({"optimizer": torch.optim.LBFGS}, ValueError, "LBFGS"),
        ({"sampler": "uniform"}, TypeError, "'uniform' is no sampler"),
        ({"workers": wsfed.VirtualWorker}, TypeError, "workers is a list"),
        ({"loss": nn.CrossEntropyLoss}, TypeError, r"give CrossEntropyLoss\(\)"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, wsfed.FederatedError, "one number"),
        ({"loss": lambda output, y: 1.0}, wsfed.FederatedError, "a loss is a tensor, not float"),
        ({"validation": "points"}, wsfed.FederatedError, "'points' is what is trained on"),
        ({"privacy": "secagg"}, ValueError, r"privacy=SecAgg\(roster\)"),
    ],
    ids=str,
)
async def test_what_does_not_fit_is_told_before_anything_is_trained(
    workers: list[wsfed.Worker], more: dict[str, Any], kind: type[Exception] | None, says: str
) -> None:
    model = more.get("model", nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    arguments = {
        "workers": workers,
        "dataset": "points",
        "loss": F.cross_entropy,
        "optimizer": SGD,
        "rounds": 1,
        "model": model,
    }
    if kind is None:
        await federated.fit(**{**arguments, **more})
        return
    with pytest.raises(kind, match=says):
        await federated.fit(**{**arguments, **more})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


async def test_rows_of_another_kind_are_told() -> None:
    wide = wsfed.Dataset("points", {"x": torch.randn(5, 3), "y": torch.zeros(5).long()})
    narrow = wsfed.Dataset("points", points(5, 0))
    async with (
        wsfed.VirtualWorker("alice", datasets=[narrow]) as alice,
        wsfed.VirtualWorker("bob", datasets=[wide]) as bob,
    ):
        with pytest.raises(wsfed.FederatedError, match=r"'bob' \(x: float32\[3\], y: int64\[\]\)"):
            await federated.fit(
                *(nn.Linear(4, 2), [alice, bob], "points", F.cross_entropy, SGD), rounds=1
            )


async def test_labels_out_of_range_are_told(workers: list[wsfed.Worker]) -> None:
    rows = points(30, 0)
    rows["y"][17] = 9
    async with wsfed.VirtualWorker("mallory", datasets=[wsfed.Dataset("points", rows)]) as mallory:
        model = nn.Linear(4, 2)
        before = copy.deepcopy(model)
        with pytest.raises(wsfed.RemoteError, match="a label is no class of what the model gives"):
            await federated.fit(
                *(model, [*workers, mallory], "points", F.cross_entropy, SGD), rounds=1
            )
        assert_equal(model, before)


async def test_an_update_that_is_no_number_is_rejected(workers: list[wsfed.Worker]) -> None:
    rows = points(30, 0)
    rows["x"][3, 1] = float("nan")
    async with wsfed.VirtualWorker("mallory", datasets=[wsfed.Dataset("points", rows)]) as mallory:
        model = nn.Linear(4, 2)
        before = copy.deepcopy(model)
        with pytest.raises(wsfed.UpdateRejected, match=r"'mallory'.*not finite") as caught:
            await federated.fit(
                *(model, [*workers, mallory], "points", F.cross_entropy, SGD), rounds=2
            )
        assert caught.value.site == "mallory"
        assert len(caught.value.history) == 0
        assert_equal(model, before)


class Odd(federated.MeanStrategy):
    """Makes something else of the mean."""

    def __init__(self, make: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        self._make = make

    def step(self, state: Any, memory: Any, mean: Any) -> Any:
        return self._make(dict(mean))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda mean: None, "two dictionaries, not NoneType"),
        (lambda mean: mean, "two dictionaries, not dict"),
        (lambda mean: ({**mean, "typo": torch.zeros(2)}, {}), "'typo'"),
        (lambda mean: ({"bias": mean["bias"]}, {}), "'weight'"),
        (lambda mean: ({**mean, "bias": torch.zeros(3)}, {}), "another model: 'bias'"),
        (lambda mean: ({**mean, "bias": mean["bias"].double()}, {}), "another model: 'bias'"),
        (lambda mean: ({**mean, "bias": mean["bias"] * torch.nan}, {}), "not finite"),
    ],
)
async def test_what_a_strategy_makes_is_looked_at(
    workers: list[wsfed.Worker], make: Callable[..., Any], says: str
) -> None:
    model = nn.Linear(4, 2)
    before = copy.deepcopy(model)
    with pytest.raises(wsfed.FederatedError, match=f"Odd.*{says}"):
        await federated.fit(
            *(model, workers, "points", F.cross_entropy, SGD), rounds=2, strategy=Odd(make)
        )
    assert_equal(model, before)


async def test_a_model_that_begins_with_nan_is_told(workers: list[wsfed.Worker]) -> None:
    model = nn.Linear(4, 2)
    nn.init.constant_(model.bias, torch.nan)
    with pytest.raises(wsfed.FederatedError, match="begins with values of 'bias'"):
        await federated.fit(*(model, workers, "points", F.cross_entropy, SGD), rounds=1)


async def test_an_evaluation_that_gives_no_number_is_told(workers: list[wsfed.Worker]) -> None:
    with pytest.raises(wsfed.FederatedError, match="evaluate gave 'good', no number"):
        await federated.fit(
            *(nn.Linear(4, 2), workers, "points", F.cross_entropy, SGD),
            rounds=1,
            evaluate=lambda model: "good",
        )


async def test_two_workers_of_one_name_are_told(workers: list[wsfed.Worker]) -> None:
    with pytest.raises(wsfed.FederatedError, match="called alice"):
        await federated.fit(
            *(nn.Linear(4, 2), [workers[0], workers[0]], "points", F.cross_entropy, SGD), rounds=1
        )
