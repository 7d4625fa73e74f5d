"""Bulyan is the paper's, and withstands what Krum does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
from wsfed.federated.strategies.bulyan import Bulyan
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.krum import Krum
from wsfed.federated.strategies.strategy import State


def flat(state: State) -> np.ndarray:
    return np.concatenate([value.numpy().ravel() for value in state.values()])


def naive(models: list[np.ndarray], byzantine: int) -> list[float]:
    """The paper's formula, number by number."""
    left, chosen = list(models), []
    theta = len(models) - 2 * byzantine
    while len(chosen) < theta:
        scores = []
        for i, one in enumerate(left):
            squares = sorted(float(((one - x) ** 2).sum()) for j, x in enumerate(left) if j != i)
            scores.append(sum(squares[: max(len(left) - byzantine - 2, 1)]))
        chosen.append(left.pop(scores.index(min(scores))))
    after = []
    for place in range(len(models[0])):
        column = [float(each[place]) for each in chosen]
        middle = float(np.median(column))
        closest = sorted(column, key=lambda value: abs(value - middle))[: theta - 2 * byzantine]
        after.append(sum(closest) / len(closest))
    return after


@pytest.mark.parametrize(("count", "byzantine"), [(3, 0), (7, 1), (8, 1), (11, 2), (14, 2)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_the_papers(count: int, byzantine: int, seed: int) -> None:
    states = random_states(count, seed)
    after = aggregated(Bulyan(byzantine), replies_of(states))
    wanted = naive([flat(state) for state in states], byzantine)
    assert flat(after).tolist() == pytest.approx(wanted, rel=1e-9)


def test_without_liars_it_is_the_mean() -> None:
    states = random_states(5)
    after = aggregated(Bulyan(0), replies_of(states))
    mean = aggregated(FedAvg(), replies_of(states))
    assert all(torch.allclose(after[name], mean[name]) for name in mean)


def test_rows_do_not_count() -> None:
    states = random_states(7)
    one = aggregated(Bulyan(1), replies_of(states))
    other = aggregated(Bulyan(1), replies_of(states, rows=[1000, 1, 1, 1, 1, 1, 1]))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("seed", range(5))
def test_one_coordinate_is_not_moved_as_with_krum(seed: int) -> None:
    """The paper's attack: a mean of honest models, far off in one coordinate of many."""
    generator = torch.Generator().manual_seed(seed)
    honest = [torch.randn(1000, generator=generator) for _ in range(9)]
    lie = torch.stack(honest).mean(0)
    lie[0] = 15
    states = [{"w": lie}, {"w": lie.clone()}, *({"w": each} for each in honest)]
    assert float(aggregated(Krum(2), replies_of(states))["w"][0]) == 15
    column = [float(each[0]) for each in honest]
    assert min(column) <= float(aggregated(Bulyan(2), replies_of(states))["w"][0]) <= max(column)


def test_every_kind_of_entry_is_dealt_with() -> None:
    after = assert_kinds_are_kept(Bulyan(2))
    assert 102 <= int(after["count"]) <= 110


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_what_is_not_finite_does_not_count(garbage: float) -> None:
    states = spoilt(random_states(11), [0, 4], garbage)
    after = aggregated(Bulyan(2), replies_of(states))
    honest = torch.stack([states[index]["a"] for index in range(11) if index not in (0, 4)])
    assert ((honest.amin(0) <= after["a"]) & (after["a"] <= honest.amax(0))).all()


def test_what_it_needs_follows_from_what_it_is_set_to() -> None:
    assert [Bulyan(f).min_replies for f in (0, 1, 2)] == [3, 7, 11]
    with pytest.raises(ValueError, match="Bulyan needs at least 11 replies, not 10"):
        aggregated(Bulyan(2), replies_of(random_states(10)))


@pytest.mark.parametrize("byzantine", [-1, 0.5])
def test_what_is_no_number_of_liars_is_refused(byzantine: int) -> None:
    with pytest.raises(ValueError, match="byzantine has to be an integer that is not negative"):
        Bulyan(byzantine)


def test_it_learns_where_federated_averaging_is_wrecked() -> None:
    sites = make_sites(liars=2)
    assert accuracy(train(Bulyan(2), sites), sites) > 0.88
    assert accuracy(train(FedAvg(), sites), sites) < 0.6
