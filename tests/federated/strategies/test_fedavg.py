"""Federated averaging is the mean by rows, and it trains."""

from __future__ import annotations

import pytest
import torch

from tests.federated.strategies.training import (
    TRAINED,
    Local,
    assert_buffers_are_means,
    assert_numbers,
    assert_same,
    best,
    differing,
    naive_mean,
    overall,
    play,
    train,
    trained,
)
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.strategy import LocalTerms, Reply


def test_the_next_model_is_the_mean_weighted_by_rows() -> None:
    turns = play(FedAvg())
    for turn in turns:
        rows = [reply.rows for reply in turn.replies]
        for name in TRAINED:
            assert_numbers(turn.next_state[name], naive_mean(turn.replies, name, rows))
    assert_buffers_are_means(turns)


def test_nothing_is_remembered_and_nothing_is_added_to_local_training() -> None:
    assert all(turn.next_memory == {} for turn in play(FedAvg()))
    assert FedAvg().local_terms({}, "ann") == LocalTerms()
    assert FedAvg().name == "FedAvg"


def test_sites_that_agree_are_their_own_mean() -> None:
    state = {"w": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    replies = [Reply(name, state, rows, 1) for name, rows in [("a", 3), ("b", 4)]]
    following, _ = FedAvg().aggregate({"w": torch.zeros(5)}, {}, replies)
    assert_same(following, state)


def test_sites_without_any_rows_have_no_mean() -> None:
    state = {"w": torch.ones(1)}
    with pytest.raises(ValueError, match="not all"):
        FedAvg().aggregate(state, {}, [Reply("a", state, 0, 0)])


def test_one_local_step_is_a_step_over_all_rows() -> None:
    sites = differing()
    sites[0] = (sites[0][0][:7], sites[0][1][:7])  # so that weights matter
    x, y = torch.cat([x for x, _ in sites]), torch.cat([y for _, y in sites])
    w = torch.zeros(x.shape[1], dtype=x.dtype)
    for state in train(FedAvg(), sites, Local(lr=0.02, steps=1), rounds=10):
        torch.testing.assert_close(state["w"], w, rtol=0, atol=1e-12)
        w = w - 0.02 * x.T @ (x @ w - y) / len(y)


def test_sites_that_agree_reach_the_common_best_model_with_many_local_steps() -> None:
    sites = differing(apart=0.0, scales=[1.0, 0.5, 2.0, 1.0])
    state = trained(FedAvg(), sites, Local(lr=0.05, steps=20), rounds=40)
    assert overall(state, sites) == pytest.approx(overall(best(sites), sites), rel=0.01)
