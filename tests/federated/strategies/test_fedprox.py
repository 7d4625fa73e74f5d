"""The proximal term is told to the sites, and it holds them where the paper says it does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from tests.federated.strategies.training import (
    Data,
    Local,
    assert_same,
    best,
    differing,
    overall,
    play,
    train,
    trained,
)
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.fedprox import FedProx
from wsfed.federated.strategies.strategy import LocalTerms, State

#: So many steps that a site all but reaches its own best model.
LONG = Local(lr=0.03, steps=40)


def test_replies_are_averaged_as_in_federated_averaging() -> None:
    for turn, other in zip(play(FedProx(0.5)), play(FedAvg()), strict=True):
        assert_same(turn.next_state, other.next_state)
        assert turn.next_memory == {}


@pytest.mark.parametrize("mu", [0, 0.01, 3.0])
def test_every_site_adds_the_same_term(mu: float) -> None:
    strategy = FedProx(mu)
    assert strategy.local_terms({}, "ann") == LocalTerms(proximal=mu)
    assert strategy.local_terms({}, "bob") == LocalTerms(proximal=mu)


@pytest.mark.parametrize("mu", [-0.1, math.inf, math.nan])
def test_a_mu_that_is_negative_or_not_finite_is_refused(mu: float) -> None:
    with pytest.raises(ValueError, match="mu has to be finite and not negative"):
        FedProx(mu)


def test_a_mu_of_0_trains_as_federated_averaging_does() -> None:
    sites = differing()
    for some, other in zip(
        train(FedProx(0.0), sites, LONG, 10), train(FedAvg(), sites, LONG, 10), strict=True
    ):
        assert_same(some, other)


def _drift(state: State, sites: Sequence[Data], mu: float) -> float:
    """How far sites move from the model that they are given."""
    terms = FedProx(mu).local_terms({}, "")
    return sum(float((LONG.train(state, x, terms)["w"] - state["w"]).norm()) for x in sites)


def test_the_larger_mu_is_the_less_sites_drift() -> None:
    sites = differing()
    drifts = [_drift(best(sites), sites, mu) for mu in (0.0, 0.1, 1.0, 10.0)]
    assert drifts == sorted(drifts, reverse=True)
    assert drifts[-1] < drifts[0] / 3


def test_sites_that_differ_end_nearer_to_the_common_best_model_than_with_averaging() -> None:
    sites = differing()
    least = overall(best(sites), sites)
    averaged = overall(trained(FedAvg(), sites, LONG, 100), sites) - least
    held = overall(trained(FedProx(10.0), sites, LONG, 100), sites) - least
    assert held < averaged / 5, (held, averaged)


def test_rounds_of_a_few_sites_swing_less_than_with_averaging() -> None:
    sites = differing()

    def swing(strategy: FedAvg) -> float:
        states = list(train(strategy, sites, LONG, 100, each=3))[50:]
        return float(torch.tensor([overall(state, sites) for state in states]).std())

    assert swing(FedProx(10.0)) < swing(FedAvg()) / 2
