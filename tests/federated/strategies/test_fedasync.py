"""An update is mixed in as soon as it comes, the less the older it is, and that converges."""

from __future__ import annotations

import math

import pytest
import torch

from tests.federated.strategies.training import (
    BUFFERS,
    TRAINED,
    Local,
    assert_numbers,
    assert_same,
    best,
    differing,
    flat,
    overall,
    play,
    rounds_to,
    train_without_waiting,
)
from wsfed.federated.strategies.fedasync import FedAsync
from wsfed.federated.strategies.strategy import Reply, State


@pytest.mark.parametrize(("alpha", "exponent"), [(0.6, 0.5), (0.3, 2.0), (0.9, 0.0), (1.0, 0.5)])
def test_each_update_is_mixed_in_after_the_other_with_its_buffers(
    alpha: float, exponent: float
) -> None:
    for turn in play(FedAsync(alpha, exponent)):
        assert [reply.staleness for reply in turn.replies] == [0, 1, 2]
        for name in (*TRAINED, *BUFFERS):
            mixed = flat(turn.state[name])
            for reply in turn.replies:
                a = alpha * (reply.staleness + 1) ** -exponent
                pairs = zip(mixed, flat(reply.state[name]), strict=True)
                mixed = [(1 - a) * w + a * own for w, own in pairs]
                if name == "count":
                    mixed = [float(round(number)) for number in mixed]
            assert_numbers(turn.next_state[name], mixed)
        assert turn.next_memory == {}


def test_a_fresh_update_of_weight_1_is_the_next_model() -> None:
    first = play(FedAsync(1.0), rounds=1)[0]
    following, _ = FedAsync(1.0).aggregate(first.state, {}, first.replies[:1], BUFFERS)
    assert_same(following, first.replies[0].state)


def test_one_update_is_enough() -> None:
    assert FedAsync().min_replies == 1


def test_the_older_an_update_is_the_less_it_moves_the_model() -> None:
    state: State = {"w": torch.zeros(1, dtype=torch.float64)}
    own: State = {"w": torch.ones(1, dtype=torch.float64)}
    moved = [
        FedAsync(0.6, 0.5)
        .aggregate(state, {}, [Reply("a", own, 1, 1, staleness=age)])[0]["w"]
        .item()
        for age in (0, 3, 8)
    ]
    assert moved == pytest.approx([0.6, 0.3, 0.2])


@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0.0},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"alpha": math.nan},
        {"exponent": -0.1},
        {"exponent": math.inf},
        {"exponent": math.nan},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"alpha has to be in \(0, 1\], exponent not negative"):
        FedAsync(**arguments)


def test_sites_that_nobody_waits_for_reach_the_common_best_model() -> None:
    sites = differing(8, apart=0.02, scales=[1.0, 1.0, 1.0, 1.0], seed=2)
    least = overall(best(sites), sites)
    states, stale = train_without_waiting(FedAsync(), sites, Local(lr=0.1, steps=5), steps=300)
    assert max(stale) > 20
    assert rounds_to(1.2 * least, states, sites) < 150
    assert max(overall(state, sites) for state in states[-50:]) < 1.1 * least


def test_weighing_by_age_makes_the_end_steadier() -> None:
    sites = differing(8, apart=0.3, scales=[1.0, 1.0, 1.0, 1.0], seed=2)

    def swing(exponent: float) -> float:
        strategy = FedAsync(exponent=exponent)
        states, _ = train_without_waiting(strategy, sites, Local(lr=0.1, steps=5), steps=300)
        return float(torch.tensor([overall(state, sites) for state in states[-100:]]).std())

    assert swing(0.5) < swing(0.0)
