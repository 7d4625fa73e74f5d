"""The coordinate-wise trimmed mean is the paper's, and extreme values are harmless."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.federated.strategies.simulation import (
    accuracy,
    aggregated,
    assert_kinds_are_kept,
    make_sites,
    random_states,
    replies_of,
    spoilt,
    train,
)
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.fedtrimmedavg import FedTrimmedAvg


@pytest.mark.parametrize(
    ("beta", "count", "dropped"), [(0.2, 4, 0), (0.2, 11, 2), (0.25, 8, 2), (0.49, 5, 2), (0, 3, 0)]
)
def test_it_is_the_mean_of_what_is_left(beta: float, count: int, dropped: int) -> None:
    states = random_states(count)
    after = aggregated(FedTrimmedAvg(beta), replies_of(states))
    for place in np.ndindex(2, 3):
        column = sorted(float(state["a"][place]) for state in states)
        left = column[dropped : count - dropped]
        assert float(after["a"][place]) == pytest.approx(sum(left) / len(left), rel=1e-12)


def test_beta_is_the_decimal_that_was_written() -> None:
    states = [{"w": torch.tensor(float(index >= 29))} for index in range(100)]
    assert 0.29 * 100 < 29  # in floats
    assert float(aggregated(FedTrimmedAvg(0.29), replies_of(states))["w"]) == 1


def test_beta_of_0_is_the_plain_mean() -> None:
    states = random_states(5)
    trimmed = aggregated(FedTrimmedAvg(0), replies_of(states))
    mean = aggregated(FedAvg(), replies_of(states))
    assert all(torch.allclose(trimmed[name], mean[name]) for name in mean)


def test_rows_do_not_count() -> None:
    states = random_states(5)
    one = aggregated(FedTrimmedAvg(), replies_of(states))
    other = aggregated(FedTrimmedAvg(), replies_of(states, rows=[1000, 1, 1, 1, 1]))
    assert all(torch.equal(one[name], other[name]) for name in one)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12),
    st.floats(0, 0.499),
    st.randoms(use_true_random=False),
)
def test_it_is_between_them_and_their_order_is_nothing(
    numbers: list[float], beta: float, random
) -> None:
    def after(order: list[float]) -> torch.Tensor:
        replies = replies_of([{"w": torch.tensor([x])} for x in order])
        return aggregated(FedTrimmedAvg(beta), replies)["w"]

    shuffled = random.sample(numbers, len(numbers))
    assert min(numbers) <= float(after(numbers)) <= max(numbers)
    assert torch.equal(after(numbers), after(shuffled))


def test_every_kind_of_entry_has_a_trimmed_mean() -> None:
    after = assert_kinds_are_kept(FedTrimmedAvg())
    assert int(after["count"]) == 105


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_as_many_as_are_dropped_cannot_move_it_beyond_the_others(garbage: float) -> None:
    states = spoilt(random_states(10), [0, 4], garbage)
    after = aggregated(FedTrimmedAvg(), replies_of(states))
    honest = torch.stack([states[index]["a"] for index in range(10) if index not in (0, 4)])
    assert ((honest.amin(0) <= after["a"]) & (after["a"] <= honest.amax(0))).all()


@pytest.mark.parametrize("beta", [-0.1, 0.5, 1, float("nan")])
def test_a_beta_that_leaves_nothing_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta has to be in \[0, 0.5\)"):
        FedTrimmedAvg(beta)


def test_no_reply_has_no_mean() -> None:
    with pytest.raises(ValueError, match="needs at least 1 replies, not 0"):
        FedTrimmedAvg().aggregate({}, {}, [])


def test_it_learns_where_federated_averaging_is_wrecked() -> None:
    sites = make_sites(liars=2)
    assert accuracy(train(FedTrimmedAvg(0.2), sites), sites) > 0.88
    assert accuracy(train(FedAvg(), sites), sites) < 0.6
