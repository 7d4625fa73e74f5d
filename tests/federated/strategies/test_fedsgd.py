"""Averaged gradients make one step, and with all sites that is gradient descent over all rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.federated.strategies.training import (
    TRAINED,
    Local,
    assert_buffers_are_means,
    assert_numbers,
    assert_same,
    differing,
    flat,
    naive_mean,
    play,
    slope,
    together,
    train,
)
from wsfed.federated.averaging import weighted_mean
from wsfed.federated.strategies.fedsgd import FedSGD
from wsfed.federated.strategies.strategy import MeanStrategy

ANY = Local(lr=0.0, steps=0)  # sites train nothing


def test_a_step_is_the_model_less_the_mean_gradient() -> None:
    turns = play(FedSGD(0.3))
    for turn in turns:
        rows = [reply.rows for reply in turn.replies]
        for name in TRAINED:
            mean = naive_mean(turn.replies, name, rows)
            expected = [w - 0.3 * g for w, g in zip(flat(turn.state[name]), mean, strict=True)]
            assert_numbers(turn.next_state[name], expected)
        assert turn.next_memory == {}
    assert_buffers_are_means(turns)


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.Adam, partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)],
    ids=["Adam", "SGD"],
)
def test_rounds_are_steps_of_the_optimizer_bit_for_bit(optimizer: type) -> None:
    turns = play(FedSGD(optimizer=optimizer), rounds=6)
    parameters = {name: turns[0].state[name].clone().requires_grad_() for name in TRAINED}
    by_hand = optimizer(parameters.values())
    for turn in turns:
        rows = [reply.rows for reply in turn.replies]
        mean = weighted_mean([reply.state for reply in turn.replies], rows)
        for name, parameter in parameters.items():
            parameter.grad = mean[name].clone()
        by_hand.step()
        assert_same({name: turn.next_state[name] for name in TRAINED}, parameters)
    assert_buffers_are_means(turns)


def test_gradients_are_asked_for_and_their_mean_is_enough() -> None:
    assert FedSGD.wants_gradients and issubclass(FedSGD, MeanStrategy)


def test_a_rate_that_torch_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="learning rate"):
        FedSGD(-0.1)
    with pytest.raises(ValueError, match="learning rate"):
        FedSGD(optimizer=partial(torch.optim.Adam, lr=-1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_20_rounds_of_all_sites_are_20_steps_of_gradient_descent(dtype: torch.dtype) -> None:
    sites = [(x.to(dtype), y.to(dtype)) for x, y in differing(rows=31, scales=[1.0, 0.5, 1.0, 0.3])]
    sites = [(x[: 5 * k + 1], y[: 5 * k + 1]) for k, (x, y) in enumerate(sites)]  # 1 to 26 rows
    w = torch.zeros(4, dtype=dtype)
    states = list(train(FedSGD(0.2), sites, ANY, rounds=20))
    assert len(states) == 21
    for state in states:
        torch.testing.assert_close(state["w"], w, rtol=0, atol=1e-6)
        w = w - 0.2 * slope(w, together(sites))
    assert float(states[-1]["w"].norm()) > 0.5  # it did go somewhere


def test_20_rounds_with_a_server_optimizer_are_20_steps_of_it_over_all_rows() -> None:
    sites = differing()
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = partial(torch.optim.Adam, lr=0.1)
    central = adam([w])
    for state in train(FedSGD(optimizer=adam), sites, ANY, rounds=20):
        torch.testing.assert_close(state["w"], w.detach(), rtol=0, atol=1e-6)
        w.grad = slope(w.detach(), together(sites))
        central.step()
