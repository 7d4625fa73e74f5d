"""The coordinate-wise median is numpy's, and garbage of less than half of the sites is harmless."""

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
from wsfed.federated.strategies.fedmedian import FedMedian

values = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_it_is_the_median_of_numpy(count: int) -> None:
    states = random_states(count)
    after = aggregated(FedMedian(), replies_of(states))
    for name in ("a", "b"):
        wanted = np.median(np.stack([state[name].numpy() for state in states]), axis=0)
        assert np.array_equal(after[name].numpy(), wanted)


def test_rows_do_not_count() -> None:
    states = random_states(4)
    one = aggregated(FedMedian(), replies_of(states))
    other = aggregated(FedMedian(), replies_of(states, rows=[1000, 1, 1, 1]))
    assert all(torch.equal(one[name], other[name]) for name in one)


@given(values, st.randoms(use_true_random=False))
def test_it_is_between_them_and_their_order_is_nothing(numbers: list[float], random) -> None:
    def after(order: list[float]) -> torch.Tensor:
        return aggregated(FedMedian(), replies_of([{"w": torch.tensor([x])} for x in order]))["w"]

    shuffled = random.sample(numbers, len(numbers))
    assert min(numbers) <= float(after(numbers)) <= max(numbers)
    assert torch.equal(after(numbers), after(shuffled))


def test_every_kind_of_entry_has_a_median() -> None:
    after = assert_kinds_are_kept(FedMedian())
    assert int(after["count"]) == 105


def test_an_even_number_of_counts_is_rounded() -> None:
    states = [{"count": torch.tensor(each)} for each in (1, 4, 5, 100)]
    assert int(aggregated(FedMedian(), replies_of(states))["count"]) == 4  # 4.5, to even


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_less_than_half_cannot_move_it_beyond_the_others(garbage: float) -> None:
    states = spoilt(random_states(7), [0, 3, 5], garbage)
    after = aggregated(FedMedian(), replies_of(states))
    honest = torch.stack([states[index]["a"] for index in (1, 2, 4, 6)])
    assert ((honest.amin(0) <= after["a"]) & (after["a"] <= honest.amax(0))).all()


def test_no_reply_has_no_median() -> None:
    with pytest.raises(ValueError, match="needs at least 1 replies, not 0"):
        FedMedian().aggregate({}, {}, [])


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ({"v": torch.ones(1)}, "site 1 and the model differ in v, w"),
        ({"w": torch.ones(2)}, r"site 1: w is torch.float32\[2\], not torch.float32\[1\]"),
        ({"w": torch.ones(1).double()}, r"site 1: w is torch.float64\[1\]"),
    ],
)
def test_a_reply_that_does_not_fit_is_refused(sent: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        aggregated(FedMedian(), replies_of([{"w": torch.ones(1)}, sent]))


def test_it_learns_where_federated_averaging_is_wrecked() -> None:
    sites = make_sites(liars=3)
    assert accuracy(train(FedMedian(), sites), sites) > 0.88
    assert accuracy(train(FedAvg(), sites), sites) < 0.6
