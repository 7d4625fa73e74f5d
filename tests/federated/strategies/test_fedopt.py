"""A server optimizer is torch's own, or the paper's three; its memory survives a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.federated.strategies.training import (
    BUFFERS,
    TRAINED,
    Data,
    Local,
    assert_buffers_are_means,
    assert_numbers,
    assert_same,
    flat,
    naive_mean,
    play,
    rounds_to,
    through_a_file,
    train,
)
from wsfed.federated.averaging import weighted_mean
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.fedavgm import FedAvgM
from wsfed.federated.strategies.fedopt import FedAdagrad, FedAdam, FedOpt, FedYogi
from wsfed.federated.strategies.fedsgd import FedSGD
from wsfed.federated.strategies.strategy import MeanStrategy, Reply, State

OPTIMIZERS = [
    partial(torch.optim.Adam, lr=0.1),
    partial(torch.optim.Adam, lr=0.1, amsgrad=True, weight_decay=0.01),
    partial(torch.optim.AdamW, lr=0.1),
    partial(torch.optim.NAdam, lr=0.1),
    partial(torch.optim.RAdam, lr=0.1),
    partial(torch.optim.Adamax, lr=0.1),
    partial(torch.optim.Adagrad, lr=0.1),
    partial(torch.optim.Adadelta, lr=0.1),
    partial(torch.optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
    partial(torch.optim.Rprop, lr=0.1),
    partial(torch.optim.ASGD, lr=0.1),
    partial(torch.optim.Adafactor, lr=0.1),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    partial(torch.optim.SGD, lr=0.1, maximize=True),
]


def _called(optimizer: partial) -> str:
    rest = [name for name in optimizer.keywords if name != "lr"]
    return " ".join([optimizer.func.__name__, *rest])


# --- any optimizer of torch's ---------------------------------------------------------------------


def test_gradient_descent_of_rate_1_is_federated_averaging() -> None:
    turns, others = play(FedOpt(partial(torch.optim.SGD, lr=1))), play(FedAvg())
    for turn, other in zip(turns, others, strict=True):
        for name, value in other.next_state.items():
            torch.testing.assert_close(turn.next_state[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=_called)
def test_rounds_are_steps_of_the_optimizer_bit_for_bit(optimizer: partial) -> None:
    turns = play(FedOpt(optimizer), rounds=6)
    parameters = {name: turns[0].state[name].clone().requires_grad_() for name in TRAINED}
    by_hand = optimizer(parameters.values())
    for turn in turns:
        rows = [reply.rows for reply in turn.replies]
        mean = weighted_mean([reply.state for reply in turn.replies], rows)
        for name, parameter in parameters.items():
            parameter.grad = parameter.detach() - mean[name]
        by_hand.step()
        assert_same({name: turn.next_state[name] for name in TRAINED}, parameters)
    assert_buffers_are_means(turns)


ALL = [
    *(pytest.param(partial(FedOpt, each), id=_called(each)) for each in OPTIMIZERS),
    FedAdam,
    FedYogi,
    FedAdagrad,
    FedAvgM,
    partial(FedSGD, optimizer=torch.optim.Adam),
]


@pytest.mark.parametrize("make", ALL)
def test_memory_that_was_in_a_file_goes_on_as_if_it_had_not_been(
    make: Callable[[], MeanStrategy], tmp_path: Path
) -> None:
    for number, turn in enumerate(play(make())):
        assert all(isinstance(value, torch.Tensor) for value in turn.memory.values())
        memory = through_a_file(turn.memory, str(tmp_path / f"{number}.safetensors"))
        state, memory = make().aggregate(turn.state, memory, turn.replies, BUFFERS)
        assert_same(state, turn.next_state)
        assert_same(memory, turn.next_memory)


def test_names_with_slashes_keep_their_own_memory() -> None:
    strategy = FedOpt(torch.optim.Adam)
    state: State = {"a": torch.ones(2), "a/b": torch.ones(3)}
    reply = Reply("x", {"a": torch.zeros(2), "a/b": torch.full((3,), 5.0)}, 1, 1)
    memory = strategy.begin(state)
    for number in (1, 2):
        state, memory = strategy.aggregate(state, memory, [reply])
        assert len(memory) == 6 and memory["a/b/exp_avg"].shape == (3,)
        assert memory["a/step"].item() == memory["a/b/step"].item() == number


def test_what_an_optimizer_refuses_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="learning rate"):
        FedOpt(partial(torch.optim.Adam, lr=-1.0))
    with pytest.raises(TypeError):
        FedOpt(partial(torch.optim.Adam, speed=1.0))


# --- the three of the paper -----------------------------------------------------------------------


def _adagrad(v: float, d: float, beta2: float) -> float:
    return v + d * d


def _yogi(v: float, d: float, beta2: float) -> float:
    sign = (v > d * d) - (v < d * d)
    return v - (1 - beta2) * d * d * sign


def _adam(v: float, d: float, beta2: float) -> float:
    return beta2 * v + (1 - beta2) * d * d


@pytest.mark.parametrize(
    ("strategy", "beta1", "beta2", "rule"),
    [
        (FedAdagrad(0.2, tau=0.05), 0.0, 0.0, _adagrad),
        (FedAdagrad(0.2, 0.8, tau=0.05), 0.8, 0.0, _adagrad),
        (FedYogi(0.2, 0.8, 0.7, 0.05), 0.8, 0.7, _yogi),
        (FedAdam(0.2, 0.8, 0.7, 0.05), 0.8, 0.7, _adam),
    ],
    ids=["Adagrad", "Adagrad with momentum", "Yogi", "Adam"],
)
def test_a_step_is_algorithm_2_in_plain_floats(
    strategy: MeanStrategy, beta1: float, beta2: float, rule: Callable[..., float]
) -> None:
    lr, tau = 0.2, 0.05
    turns = play(strategy, rounds=6)
    m = {name: [0.0] * turns[0].state[name].numel() for name in TRAINED}
    v = {name: [tau * tau] * turns[0].state[name].numel() for name in TRAINED}
    for turn in turns:
        rows = [reply.rows for reply in turn.replies]
        for name in TRAINED:
            mean, expected = naive_mean(turn.replies, name, rows), []
            for i, w in enumerate(flat(turn.state[name])):
                d = mean[i] - w
                m[name][i] = beta1 * m[name][i] + (1 - beta1) * d
                v[name][i] = rule(v[name][i], d, beta2)
                expected.append(w + lr * m[name][i] / (math.sqrt(v[name][i]) + tau))
            assert_numbers(turn.next_state[name], expected)
            assert_numbers(turn.next_memory[f"{name}/m"], m[name])
            assert_numbers(turn.next_memory[f"{name}/v"], v[name])
    assert_buffers_are_means(turns)


def test_settings_are_those_of_the_paper_where_nobody_says_otherwise() -> None:
    for strategy in (FedAdam(), FedYogi()):
        assert (strategy.beta1, strategy.beta2, strategy.tau) == (0.9, 0.99, 1e-3)
    assert (FedAdagrad().beta1, FedAdagrad().tau) == (0.0, 1e-3)


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"tau": 0.0},
        {"beta1": 1.0},
        {"beta1": -0.1},
        {"beta2": 1.0},
        {"beta2": -0.1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(kind: type, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: lr and tau have to be positive"):
        kind(**arguments)


@pytest.mark.parametrize("arguments", [{"lr": 0.0}, {"tau": 0.0}, {"beta1": 1.0}], ids=str)
def test_settings_of_adagrad_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="FedAdagrad: lr and tau"):
        FedAdagrad(**arguments)


# --- worth ----------------------------------------------------------------------------------------


def _sparse() -> list[Data]:
    """Columns of which each is seen half as often as the one before, at each site others."""
    generator = torch.Generator().manual_seed(3)
    columns = 8
    often = 0.5 ** torch.arange(columns, dtype=torch.float64)
    truth = torch.randn(columns, generator=generator, dtype=torch.float64)
    sites = []
    for _ in range(6):
        seen = torch.rand(80, columns, generator=generator, dtype=torch.float64) < often
        x = seen.double()
        noise = torch.randn(80, generator=generator, dtype=torch.float64)
        sites.append((x, x @ truth + 0.01 * noise))
    return sites


@pytest.mark.parametrize("make", [FedAdam, FedYogi, FedAdagrad])
def test_a_sparse_problem_takes_far_fewer_rounds_than_averaging_at_its_best_rate(
    make: Callable[..., MeanStrategy],
) -> None:
    sites = _sparse()

    def rounds(strategy: MeanStrategy, lr: float) -> float:
        return rounds_to(1e-4, train(strategy, sites, Local(lr, steps=5), rounds=200), sites)

    plain = min(rounds(FedAvg(), lr) for lr in (0.3, 1.0))  # 1.5 is too much for a site
    faster = rounds(make(lr=0.3), 1.0)
    assert faster < plain / 2, (faster, plain)
