"""The geometric median is where the mean distance is least, and garbage hardly moves it."""

from __future__ import annotations

import math

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
from wsfed.federated.strategies.geometric import GeometricMedian
from wsfed.federated.strategies.strategy import State

#: Where a test wants the optimum itself.
EXACT = GeometricMedian(tolerance=1e-10, most=5000)


def flat(state: State) -> np.ndarray:
    return np.concatenate([value.numpy().ravel() for value in state.values()])


def points(*pairs: tuple[float, float]) -> list[State]:
    return [{"w": torch.tensor(pair, dtype=torch.float64)} for pair in pairs]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [[1] * 6, [3, 1, 4, 1, 5, 2]])
def test_no_direction_leads_closer_to_all(seed: int, rows: list[int]) -> None:
    states = random_states(6, seed)
    middle = flat(aggregated(EXACT, replies_of(states, rows)))
    gradient = np.zeros_like(middle)
    for count, state in zip(rows, states, strict=True):
        away = middle - flat(state)
        gradient += count * away / math.sqrt((away**2).sum())
    assert np.abs(gradient).max() < 1e-8 * sum(rows)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_its_steps_are_the_papers(steps: int) -> None:
    states, rows = random_states(5), [1, 2, 3, 4, 5]
    models = [flat(state) for state in states]

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return math.sqrt(((one - other) ** 2).sum())

    def radius(model: np.ndarray) -> float:
        counted = 0
        for away, count in sorted(zip((distance(model, w) for w in models), rows, strict=True)):
            counted += count
            if counted > sum(rows) / 2:
                return away
        raise AssertionError

    def mixed(distances: list[float]) -> np.ndarray:
        pulls = [n / sum(rows) / max(2.0, d) for n, d in zip(rows, distances, strict=True)]
        return sum(b * w for b, w in zip(pulls, models, strict=True)) / sum(pulls)

    middle = mixed([radius(w) for w in models])
    for _ in range(steps):
        middle = mixed([distance(middle, w) for w in models])
    strategy = GeometricMedian(tolerance=0, most=steps, smooth=2.0)
    assert np.allclose(flat(aggregated(strategy, replies_of(states, rows))), middle, rtol=1e-12)


def test_of_a_square_it_is_the_middle_whatever_its_size() -> None:
    for size in (1e-3, 1.0, 1e6):
        corners = points((0, 0), (size, 0), (size, size), (0, size))
        after = aggregated(GeometricMedian(), replies_of(corners))["w"]
        assert torch.allclose(after, torch.tensor([size, size]).double() / 2)


def test_of_a_convex_quadrilateral_it_is_where_the_diagonals_cross() -> None:
    after = aggregated(EXACT, replies_of(points((0, 0), (4, 0), (6, 6), (0, 2))))["w"]
    # y = x and x / 4 + y / 2 = 1
    assert torch.allclose(after, torch.tensor([4 / 3, 4 / 3]).double(), atol=1e-7)


def test_a_site_with_more_than_half_of_the_rows_has_its_way() -> None:
    replies = replies_of(points((0, 0), (5, 1), (-3, 8)), rows=[11, 5, 5])
    assert aggregated(GeometricMedian(), replies)["w"].abs().max() < 1e-5


def test_a_site_without_rows_does_not_count() -> None:
    replies = replies_of(points((0, 0), (1, 1), (9, 9)), rows=[1, 1, 0])
    assert torch.allclose(aggregated(FedAvg(), replies)["w"], torch.tensor([0.5, 0.5]).double())
    assert torch.allclose(aggregated(GeometricMedian(), replies)["w"], torch.tensor(0.5).double())


@given(st.permutations(range(5)), st.integers(0, 5))
def test_their_order_is_nothing_and_it_is_between_them(order: list[int], seed: int) -> None:
    states = random_states(5, seed)
    one = aggregated(GeometricMedian(), replies_of(states))
    other = aggregated(GeometricMedian(), replies_of([states[each] for each in order]))
    assert all(torch.allclose(one[name], other[name], atol=1e-9) for name in one)
    all_a = torch.stack([state["a"] for state in states])
    assert ((all_a.amin(0) <= one["a"]) & (one["a"] <= all_a.amax(0))).all()


def test_equal_models_stay_what_they_are() -> None:
    states = [random_states(1)[0]] * 4
    after = aggregated(GeometricMedian(), replies_of(states))
    assert all(torch.allclose(after[name], states[0][name], rtol=1e-12) for name in after)


def test_every_kind_of_entry_is_dealt_with() -> None:
    assert_kinds_are_kept(GeometricMedian())


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e300, 1e30])
def test_garbage_of_any_size_hardly_moves_it(garbage: float) -> None:
    states = spoilt(random_states(11), [0, 2, 4, 7, 9], garbage)
    after = aggregated(GeometricMedian(), replies_of(states))
    assert all((value.abs() < 3).all() for value in after.values())


def test_of_nothing_there_is_none() -> None:
    with pytest.raises(ValueError, match="needs at least 1 replies, not 0"):
        GeometricMedian().aggregate({}, {}, [])
    with pytest.raises(ValueError, match="none of 2 replies is finite and has rows"):
        aggregated(GeometricMedian(), replies_of(points((0, 0), (math.nan, 0)), rows=[0, 1]))


@pytest.mark.parametrize(
    "settings", [{"tolerance": -1}, {"tolerance": math.nan}, {"most": 0}, {"smooth": 0}]
)
def test_settings_without_a_sense_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="most and smooth have to be positive"):
        GeometricMedian(**settings)


def test_it_learns_where_federated_averaging_is_wrecked() -> None:
    sites = make_sites(liars=3)
    assert accuracy(train(GeometricMedian(), sites), sites) > 0.85
    assert accuracy(train(FedAvg(), sites), sites) < 0.6
