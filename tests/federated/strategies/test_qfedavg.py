"""q-FedAvg is the formula of its paper, and sites end more alike."""

from __future__ import annotations

import math

import pytest
import torch

from tests.federated.strategies.training import (
    TRAINED,
    Data,
    Local,
    assert_buffers_are_means,
    assert_numbers,
    flat,
    loss,
    naive_mean,
    overall,
    play,
    trained,
)
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.qfedavg import QFedAvg
from wsfed.federated.strategies.strategy import Reply


@pytest.mark.parametrize("lipschitz", [1.0, 10.0])
@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 5.0])
def test_a_step_is_algorithm_2_in_plain_floats(q: float, lipschitz: float) -> None:
    turns = play(QFedAvg(q, lipschitz=lipschitz))
    for turn in turns:
        old = [number for name in TRAINED for number in flat(turn.state[name])]
        deltas, h = [], 0.0
        for reply in turn.replies:
            own = [number for name in TRAINED for number in flat(reply.state[name])]
            g = [lipschitz * (w - w_k) for w, w_k in zip(old, own, strict=True)]
            f = reply.loss_before
            assert f is not None
            deltas.append([f**q * each for each in g])
            h += q * f ** (q - 1) * math.fsum(each**2 for each in g) + lipschitz * f**q
        expected = [w - math.fsum(d) / h for w, *d in zip(old, *deltas, strict=True)]
        for name in TRAINED:
            count = turn.state[name].numel()
            found = turn.next_state[name]
            # the strategy adds 1e-10 to losses of 0.1 and more
            near = 1e-7 if found.dtype == torch.float64 else 2e-5
            assert flat(found) == pytest.approx(expected[:count], rel=near, abs=near)
            expected = expected[count:]
        assert turn.next_memory == {}
    assert_buffers_are_means(turns)


def test_a_q_of_0_is_the_mean_of_the_models_whatever_their_rows() -> None:
    for turn in play(QFedAvg(0.0)):
        for name in TRAINED:
            assert_numbers(turn.next_state[name], naive_mean(turn.replies, name, [1, 1, 1]))


def test_losses_are_asked_for() -> None:
    assert QFedAvg.wants_loss_before


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("least", [0.0, -1.0])
def test_a_loss_of_0_or_less_leaves_the_model_finite(q: float, least: float) -> None:
    state = {"w": torch.ones(2)}
    replies = [
        Reply("a", {"w": torch.tensor([2.0, 0.0])}, 1, 1, loss_before=least),
        Reply("b", {"w": torch.tensor([0.0, 3.0])}, 1, 1, loss_before=1.0),
    ]
    following, _ = QFedAvg(q).aggregate(state, {}, replies)
    assert following["w"].isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"q": -0.1},
        {"q": math.inf},
        {"q": math.nan},
        {"lipschitz": 0.0},
        {"lipschitz": -1.0},
        {"lipschitz": math.inf},
        {"lipschitz": math.nan},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="q must not be negative, lipschitz has to be positive"):
        QFedAvg(**arguments)


def _one_against_many() -> list[Data]:
    """Five sites that agree, and a sixth that wants something else."""
    generator = torch.Generator().manual_seed(1)
    sites = []
    for want in (1.0, 1.0, 1.0, 1.0, 1.0, -1.0):
        x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
        noise = torch.randn(40, generator=generator, dtype=torch.float64)
        sites.append((x, x.sum(1) * want + 0.3 * noise))
    return sites


def test_the_larger_q_is_the_more_alike_are_the_losses_of_the_sites() -> None:
    sites = _one_against_many()
    local = Local(lr=0.1, steps=3)
    models = [trained(FedAvg(), sites, local, 200)] + [
        trained(QFedAvg(q, lipschitz=10.0), sites, local, 200) for q in (0.5, 1.0, 2.0)
    ]
    losses = [torch.tensor([loss(model, site) for site in sites]) for model in models]
    spreads = [float(each.var()) for each in losses]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < spreads[0] / 4, spreads
    worst = [float(each.max()) for each in losses]
    assert worst == sorted(worst, reverse=True), worst
    means = [overall(model, sites) for model in models]  # that is its price
    assert means == sorted(means), means
