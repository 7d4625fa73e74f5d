"""Krum takes the reply that the paper's formula says, and no garbage."""

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
from wsfed.federated.strategies.krum import Krum, MultiKrum, krum_scores
from wsfed.federated.strategies.stacking import squared_distances
from wsfed.federated.strategies.strategy import State


def naive_scores(states: list[State], byzantine: int) -> list[float]:
    flat = [np.concatenate([v.numpy().ravel() for v in state.values()]) for state in states]
    scores = []
    for i, one in enumerate(flat):
        squares = sorted(float(((one - x) ** 2).sum()) for j, x in enumerate(flat) if j != i)
        scores.append(sum(squares[: len(states) - byzantine - 2]))
    return scores


@pytest.mark.parametrize(("count", "byzantine"), [(3, 0), (5, 1), (8, 2), (11, 4), (12, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_and_choice_are_the_papers(count: int, byzantine: int, seed: int) -> None:
    states = random_states(count, seed)
    wanted = naive_scores(states, byzantine)
    scores = krum_scores(squared_distances(replies_of(states)), byzantine)
    assert scores.tolist() == pytest.approx(wanted, rel=1e-12)
    after = aggregated(Krum(byzantine), replies_of(states))
    assert torch.equal(after["a"], states[int(np.argmin(wanted))]["a"])


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_multi_krum_is_the_mean_of_the_best(keep: int) -> None:
    states = random_states(9)
    best = sorted(range(9), key=naive_scores(states, 3).__getitem__)[:keep]
    after = aggregated(MultiKrum(3, keep), replies_of(states))
    for name, value in after.items():
        assert torch.allclose(value, sum(states[each][name] for each in best) / keep)


def test_ties_go_to_the_first() -> None:
    pairs = [{"w": torch.tensor(each)} for each in (9.0, 3.0, 2.0)]  # 3 and 2: as close to another
    assert float(aggregated(Krum(0), replies_of(pairs))["w"]) == 3


def test_rows_do_not_count() -> None:
    states = random_states(7)
    one = aggregated(MultiKrum(2, 3), replies_of(states))
    other = aggregated(MultiKrum(2, 3), replies_of(states, rows=[1000, 1, 1, 1, 1, 1, 1]))
    assert all(torch.equal(one[name], other[name]) for name in one)


@given(st.permutations(range(9)), st.integers(0, 5))
def test_their_order_is_nothing(order: list[int], seed: int) -> None:
    states = random_states(9, seed)
    shuffled = [states[each] for each in order]
    for strategy in (Krum(3), MultiKrum(3, 4)):
        one = aggregated(strategy, replies_of(states))
        other = aggregated(strategy, replies_of(shuffled))
        assert all(torch.allclose(one[name], other[name], rtol=1e-12) for name in one)


def test_every_kind_of_entry_is_that_of_the_same_reply() -> None:
    after = assert_kinds_are_kept(Krum(2))
    assert float(after["single"][0]) == pytest.approx(0.1 * (int(after["count"]) - 100))
    after = assert_kinds_are_kept(MultiKrum(2, 9))
    assert int(after["count"]) == 106  # the mean of 102 to 110


def test_counts_are_no_part_of_a_distance() -> None:
    states = [
        {"w": torch.tensor(w), "count": torch.tensor(count)}
        for w, count in ((5.0, 1), (0.0, 9000), (0.1, 1), (9.0, 1), (9.5, 1))
    ]
    squares = squared_distances(replies_of(states))
    assert squares[0, 1] == 25 and torch.equal(squares, squares.T)


def test_the_distance_of_complex_entries_is_that_of_their_size() -> None:
    states = [{"w": torch.tensor([each, 1j])} for each in (0j, 3 + 4j)]
    assert squared_distances(replies_of(states)).tolist() == [[0, 25], [25, 0]]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("strategy", [Krum(3), MultiKrum(3, 6)])
def test_what_is_not_finite_is_not_taken(strategy: MultiKrum, garbage: float) -> None:
    states = spoilt(random_states(9), [0, 1, 5], garbage)
    after = aggregated(strategy, replies_of(states))
    assert all((value.abs() < 10).all() for value in after.values())


def test_what_they_need_follows_from_what_they_are_set_to() -> None:
    assert [Krum(f).min_replies for f in (0, 1, 4)] == [3, 5, 11]
    assert MultiKrum(2, 5).min_replies == 7
    assert MultiKrum(2, 6).min_replies == 8  # or garbage would be kept


@pytest.mark.parametrize("byzantine", [-1, 1.5])
def test_what_is_no_number_of_liars_is_refused(byzantine: int) -> None:
    with pytest.raises(ValueError, match="byzantine has to be an integer that is not negative"):
        Krum(byzantine)


@pytest.mark.parametrize("keep", [0, -1, 1.5])
def test_what_is_no_number_to_keep_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="keep has to be a positive integer"):
        MultiKrum(1, keep)


def test_too_few_replies_are_refused() -> None:
    with pytest.raises(ValueError, match="Krum needs at least 7 replies, not 6"):
        aggregated(Krum(2), replies_of(random_states(6)))


@pytest.mark.parametrize("strategy", [Krum(4), MultiKrum(4, 5)])
def test_they_learn_where_federated_averaging_is_wrecked(strategy: MultiKrum) -> None:
    sites = make_sites(liars=4)
    assert accuracy(train(strategy, sites), sites) > 0.85
    assert accuracy(train(FedAvg(), sites), sites) < 0.6
