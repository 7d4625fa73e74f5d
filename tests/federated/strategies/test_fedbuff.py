"""Buffered updates are added up by their age, and stale ones do no harm."""

from __future__ import annotations

import math

import pytest
import torch

from tests.federated.strategies.training import (
    TRAINED,
    Local,
    assert_buffers_are_means,
    assert_numbers,
    best,
    differing,
    flat,
    naive_mean,
    overall,
    play,
    train_without_waiting,
    trained,
)
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.fedbuff import FedBuff
from wsfed.federated.strategies.strategy import Reply, State


@pytest.mark.parametrize("lr", [1.0, 0.4])
def test_a_step_is_algorithm_1_with_the_paper_s_scaling(lr: float) -> None:
    turns = play(FedBuff(3, lr=lr))
    for turn in turns:
        assert [reply.staleness for reply in turn.replies] == [0, 1, 2]
        for name in TRAINED:
            expected = flat(turn.state[name])
            for reply in turn.replies:
                given = turn.state if reply.given is None else reply.given
                scale = lr / 3 / math.sqrt(1 + reply.staleness)
                pairs = zip(flat(reply.state[name]), flat(given[name]), strict=True)
                changes = [scale * (own - old) for own, old in pairs]
                expected = [w + d for w, d in zip(expected, changes, strict=True)]
            assert_numbers(turn.next_state[name], expected)
        assert turn.next_memory == {}
    assert_buffers_are_means(turns)


def test_it_waits_for_as_many_updates_as_it_was_told() -> None:
    assert FedBuff(7).min_replies == 7
    assert FedBuff().min_replies == 10


def test_fresh_updates_make_the_mean_of_the_models_whatever_their_rows() -> None:
    turn = play(FedBuff(3), rounds=1)[0]
    replies = [Reply(each.site, each.state, each.rows, each.steps) for each in turn.replies]
    following, _ = FedBuff(3).aggregate(turn.state, {}, replies)
    for name in TRAINED:
        assert_numbers(following[name], naive_mean(replies, name, [1, 1, 1]))


def test_an_update_counts_from_the_model_that_its_site_was_given() -> None:
    state: State = {"w": torch.tensor([10.0])}
    old: State = {"w": torch.tensor([2.0])}
    reply = Reply("a", {"w": torch.tensor([4.0])}, 1, 1, staleness=3, given=old)
    following, _ = FedBuff(1).aggregate(state, {}, [reply])
    assert following["w"].item() == 11.0  # 10 + (4 - 2) / sqrt(1 + 3)


@pytest.mark.parametrize(
    "arguments",
    [{"size": 0}, {"size": -1}, {"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}],
    ids=str,
)
def test_settings_that_are_not_positive_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="have to be positive"):
        FedBuff(**arguments)


@pytest.mark.parametrize("size", [2, 4])
def test_stale_updates_reach_the_loss_of_rounds_that_wait(size: int) -> None:
    sites = differing(8, apart=0.02, scales=[1.0, 1.0, 1.0, 1.0], seed=2)
    local = Local(lr=0.1, steps=5)
    states, stale = train_without_waiting(FedBuff(size), sites, local, steps=320 // size)
    assert max(stale) > 5 and sum(stale) / len(stale) > 1
    waited = overall(trained(FedAvg(), sites, local, rounds=40), sites)
    least = overall(best(sites), sites)
    assert waited == pytest.approx(least, rel=0.02)
    assert max(overall(state, sites) for state in states[-10:]) == pytest.approx(waited, rel=0.1)
