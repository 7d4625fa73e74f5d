"""SCAFFOLD is algorithm 1 with option II, and sites that differ no longer drift."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.federated.strategies.training import (
    BUFFERS,
    EVERYONE,
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
    through_a_file,
    train,
    trained,
)
from wsfed.federated.strategies.fedavg import FedAvg
from wsfed.federated.strategies.fedprox import FedProx
from wsfed.federated.strategies.scaffold import Scaffold
from wsfed.federated.strategies.strategy import LocalTerms, Reply, State


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_rounds_are_algorithm_1_with_option_2(server_lr: float) -> None:
    lr, everyone = 0.1, 5  # of which one never takes part
    strategy = Scaffold(lr, everyone, server_lr=server_lr)
    turns = play(strategy, rounds=6)
    common = {name: [0.0] * turns[0].state[name].numel() for name in TRAINED}
    own = {site: {name: list(common[name]) for name in TRAINED} for site in EVERYONE}
    for turn in turns:
        for name in TRAINED:
            x, c = flat(turn.state[name]), common[name]
            moved, turned = [0.0] * len(x), [0.0] * len(x)
            for reply in turn.replies:
                c_k, y = own[reply.site][name], flat(reply.state[name])
                plus = [c_k[i] - c[i] + (x[i] - y[i]) / (reply.steps * lr) for i in range(len(x))]
                moved = [moved[i] + (y[i] - x[i]) / len(turn.replies) for i in range(len(x))]
                turned = [turned[i] + plus[i] - c_k[i] for i in range(len(x))]
                own[reply.site][name] = plus
            assert_numbers(
                turn.next_state[name], [a + server_lr * d for a, d in zip(x, moved, strict=True)]
            )
            common[name] = [a + d / everyone for a, d in zip(c, turned, strict=True)]
        for site in EVERYONE:
            found = strategy.local_terms(turn.next_memory, site)
            assert found.proximal == 0 and found.correction.keys() == TRAINED.keys()
            for name, value in found.correction.items():
                assert value.dtype == turn.state[name].dtype
                pairs = zip(common[name], own[site][name], strict=True)
                assert flat(value) == pytest.approx([c - c_k for c, c_k in pairs], abs=1e-4)
    assert_buffers_are_means(turns)


def test_nothing_is_corrected_before_the_first_round() -> None:
    strategy = Scaffold(0.1, 3)
    memory = strategy.begin({"w": torch.ones(2)})
    assert strategy.local_terms(memory, "ann") == LocalTerms()


def test_a_site_that_is_new_is_corrected_by_what_all_do() -> None:
    strategy = Scaffold(0.5, 2)
    state = {"w": torch.zeros(2)}
    reply = Reply("ann", {"w": torch.tensor([-1.0, 2.0])}, 1, steps=2)
    _, memory = strategy.aggregate(state, strategy.begin(state), [reply])
    # ann's gradient was (1, -2); half of the sites are ann
    assert flat(strategy.local_terms(memory, "new").correction["w"]) == [0.5, -1.0]
    assert flat(strategy.local_terms(memory, "ann").correction["w"]) == [-0.5, 1.0]


def test_sites_whose_names_begin_alike_are_told_apart() -> None:
    strategy = Scaffold(1.0, 4)
    names = ["a", "a/b", "c", "of a"]
    state: State = {"w": torch.zeros(1)}
    replies = [
        Reply(name, {"w": torch.full((1,), -float(k))}, 1, 1) for k, name in enumerate(names)
    ]
    _, memory = strategy.aggregate(state, {}, replies)
    for k, name in enumerate(names):
        correction = strategy.local_terms(memory, name).correction
        assert correction.keys() == {"w"} and correction["w"].item() == 1.5 - k


def test_memory_that_was_in_a_file_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    for number, turn in enumerate(play(Scaffold(0.1, 4))):
        memory = through_a_file(turn.memory, str(tmp_path / f"{number}.safetensors"))
        state, memory = Scaffold(0.1, 4).aggregate(turn.state, memory, turn.replies, BUFFERS)
        assert_same(state, turn.next_state)
        assert_same(memory, turn.next_memory)


def test_the_first_round_is_the_mean_of_the_models_whatever_their_rows() -> None:
    first = play(Scaffold(0.1, 4), rounds=1)[0]
    for name in TRAINED:
        assert_numbers(first.next_state[name], naive_mean(first.replies, name, [1, 1, 1]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": 0.0},
        {"lr": -0.1},
        {"lr": math.nan},
        {"sites": 0},
        {"sites": -1},
        {"server_lr": 0.0},
        {"server_lr": -1.0},
        {"server_lr": math.nan},
    ],
    ids=str,
)
def test_settings_that_are_not_positive_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="have to be positive"):
        Scaffold(**{"lr": 0.1, "sites": 3, **arguments})


@pytest.mark.parametrize("each", [None, 3], ids=["all sites", "3 of 6 sites"])
def test_sites_that_differ_reach_the_common_best_model_and_with_averaging_they_do_not(
    each: int | None,
) -> None:
    sites = differing()
    least = overall(best(sites), sites)
    local = Local(lr=0.03, steps=30)
    averaged, held, corrected = (
        overall(trained(strategy, sites, local, 150, each=each), sites) - least
        for strategy in (FedAvg(), FedProx(10.0), Scaffold(0.03, len(sites)))
    )
    assert corrected < 1e-6 * averaged, (corrected, averaged)
    assert corrected < held


def test_more_local_steps_help() -> None:
    sites = differing()
    least = overall(best(sites), sites)
    excess = [
        overall(trained(Scaffold(0.03, len(sites)), sites, Local(0.03, steps), 20), sites) - least
        for steps in (1, 5, 30)
    ]
    assert excess == sorted(excess, reverse=True) and excess[-1] < excess[0] / 10, excess


def test_one_local_step_is_a_step_over_all_rows() -> None:
    sites = differing()  # of equally many rows
    for some, other in zip(
        train(Scaffold(0.03, len(sites)), sites, Local(0.03, 1), 10),
        train(FedAvg(), sites, Local(0.03, 1), 10),
        strict=True,
    ):
        torch.testing.assert_close(some["w"], other["w"], rtol=0, atol=1e-12)
