"""Momentum on the server is the recursion of the paper, and it is worth its name."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.federated.strategies.training import (
    TRAINED,
    Local,
    assert_buffers_are_means,
    assert_numbers,
    assert_same,
    best,
    differing,
    flat,
    naive_mean,
    overall,
    play,
    rounds_to,
    train,
)
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.fedavgm import FedAvgM


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.9), (0.3, 0.5)])
def test_a_step_is_the_recursion_of_w_and_v(lr: float, momentum: float, nesterov: bool) -> None:
    turns = play(FedAvgM(lr, momentum, nesterov=nesterov), rounds=6)
    velocity = {name: [0.0] * turns[0].state[name].numel() for name in TRAINED}
    for turn in turns:
        rows = [reply.rows for reply in turn.replies]
        for name in TRAINED:
            old = flat(turn.state[name])
            mean = naive_mean(turn.replies, name, rows)
            change = [m - w for m, w in zip(mean, old, strict=True)]
            v = [momentum * v - d for v, d in zip(velocity[name], change, strict=True)]
            velocity[name] = v
            if nesterov:  # the gradient, less a look ahead along the velocity
                v = [momentum * v - d for v, d in zip(v, change, strict=True)]
            assert_numbers(turn.next_state[name], [w - lr * v for w, v in zip(old, v, strict=True)])
    assert_buffers_are_means(turns)


def test_the_velocity_is_all_that_is_remembered() -> None:
    for turn in play(FedAvgM()):
        assert turn.next_memory.keys() == {f"{name}/momentum_buffer" for name in TRAINED}
        assert all(
            turn.next_memory[f"{name}/momentum_buffer"].dtype == turn.state[name].dtype
            for name in TRAINED
        )
    turns = play(FedAvgM())
    for turn, after in pairwise(turns):
        assert_same(turn.next_memory, after.memory)


def test_without_momentum_it_is_federated_averaging() -> None:
    turns, others = play(FedAvgM(momentum=0.0)), play(FedAvg())
    for turn, other in zip(turns, others, strict=True):
        for name in TRAINED:
            assert_numbers(turn.next_state[name], flat(other.next_state[name]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lr": -1.0}, "learning rate"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": 0.0, "nesterov": True}, "Nesterov"),
    ],
)
def test_what_is_no_momentum_is_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FedAvgM(**arguments)


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_ill_conditioned_problem_takes_far_fewer_rounds(nesterov: bool) -> None:
    sites = differing(apart=0.1, scales=[1.0, 0.3, 0.1, 0.05])
    least = overall(best(sites), sites)
    local = Local(lr=0.3, steps=5)

    def rounds(strategy: FedAvg | FedAvgM) -> float:
        return rounds_to(1.05 * least, train(strategy, sites, local, rounds=400), sites)

    plain, faster = rounds(FedAvg()), rounds(FedAvgM(nesterov=nesterov))
    assert faster < plain / 2, (faster, plain)
