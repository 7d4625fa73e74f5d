"""Logistic regression over sites of which some lie, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from wsfed.federated.strategies.strategy import Reply, State, Strategy

COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Site:
    name: str
    inputs: torch.Tensor
    labels: torch.Tensor
    honest: bool


def make_sites(count: int = 11, liars: int = 0, rows: int = 60, seed: int = 0) -> list[Site]:
    """Rows of two classes that a line through near 0 tells apart, but for 5 % of labels."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.randn(COLUMNS, generator=generator)
    sites = []
    for index in range(count):
        inputs = torch.randn(rows, COLUMNS, generator=generator)
        wrong = torch.rand(rows, generator=generator) < 0.05
        labels = ((inputs @ line + 0.5 > 0) ^ wrong).float()
        # liars are the first: a strategy that takes whoever comes first is caught
        sites.append(Site(f"site {index}", inputs, labels, honest=index >= liars))
    return sites


def flipped(state: State) -> State:
    """The garbage: the trained model, its sign flipped, ten times as large."""
    return {name: -10 * value for name, value in state.items()}


def train(
    strategy: Strategy,
    sites: Sequence[Site],
    rounds: int = 15,
    attack: Callable[[State], State] = flipped,
) -> State:
    """The model after some rounds in which every site replies, liars with what ``attack`` makes."""
    state: State = {"weight": torch.zeros(COLUMNS), "bias": torch.zeros(1)}
    memory = strategy.begin(state)
    for _ in range(rounds):
        replies = []
        for site in sites:
            trained = descend(state, site)
            sent = trained if site.honest else attack(trained)
            replies.append(Reply(site.name, sent, rows=len(site.labels), steps=5))
        state, memory = strategy.aggregate(state, memory, replies)
    return state


def descend(state: State, site: Site, steps: int = 5, lr: float = 0.5) -> State:
    """A site's own training: gradient descent over all of its rows."""
    values = {name: value.clone().requires_grad_() for name, value in state.items()}
    for _ in range(steps):
        scores = site.inputs @ values["weight"] + values["bias"]
        loss = F.binary_cross_entropy_with_logits(scores, site.labels)
        for value, slope in zip(
            values.values(), torch.autograd.grad(loss, list(values.values())), strict=True
        ):
            value.data -= lr * slope
    return {name: value.detach() for name, value in values.items()}


def accuracy(state: State, sites: Sequence[Site]) -> float:
    """Over the rows of all sites; 0.95 is as good as it gets."""
    right = [
        (site.inputs @ state["weight"] + state["bias"] > 0) == site.labels.bool() for site in sites
    ]
    return float(torch.cat(right).double().mean())


def replies_of(states: Sequence[State], rows: Sequence[int] | None = None) -> list[Reply]:
    """Replies of as many sites; of 1 row where none are given."""
    rows = [1] * len(states) if rows is None else rows
    return [
        Reply(f"site {index}", state, rows=count, steps=1)
        for index, (state, count) in enumerate(zip(states, rows, strict=True))
    ]


def random_states(count: int, seed: int = 0) -> list[State]:
    """Models of two entries, in float64, as oracles want them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "a": torch.randn(2, 3, generator=generator, dtype=torch.float64),
            "b": torch.randn((), generator=generator, dtype=torch.float64),
        }
        for _ in range(count)
    ]


def aggregated(strategy: Strategy, replies: Sequence[Reply]) -> State:
    """The next model."""
    state, memory = strategy.aggregate(replies[0].state, {}, replies)
    assert memory == {}
    return state


def mixed_states() -> list[State]:
    """Eleven models with entries of every kind, near each other, but for two that are far."""
    states: list[State] = []
    for index in range(11):
        near = torch.tensor([-1e3, 1e3][index] if index < 2 else 0.1 * index)
        states.append(
            {
                "half": near.half().repeat(2),
                "single": near.repeat(3),
                "complex": torch.complex(near, -near).repeat(2),
                "count": torch.tensor(100 + index),
                "flag": torch.tensor([index < 2, index >= 2]),
                "none": torch.zeros(0),
            }
        )
    return states


def assert_kinds_are_kept(strategy: Strategy) -> State:
    """Every entry keeps its dtype and shape, and is near the honest ones.

    Returns:
        the next model.
    """
    states = mixed_states()
    after = aggregated(strategy, replies_of(states))
    for name, value in states[0].items():
        assert (after[name].dtype, after[name].shape) == (value.dtype, value.shape), name
    assert ((after["single"] >= 0.2) & (after["single"] <= 1)).all()
    assert torch.allclose(after["half"].float(), after["single"][:2], atol=1e-2)
    pair = after["complex"]
    assert torch.allclose(pair.real, after["single"][:2]) and torch.allclose(pair.imag, -pair.real)
    assert after["flag"].tolist() == [False, True]
    assert 100 <= int(after["count"]) <= 110
    return after


def spoilt(states: Sequence[State], indices: Sequence[int], value: float) -> list[State]:
    """The same models, but some are full of one value."""
    return [
        {name: torch.full_like(v, value) for name, v in state.items()} if i in indices else state
        for i, state in enumerate(states)
    ]
