"""Replies made up at random, for oracles; and sites that train in plain torch, for what papers say.

Nothing here is of wsfed but the strategies themselves and the words they speak in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch

from wsfed.federated.strategies.strategy import LocalTerms, Memory, Reply, State, Strategy

# --- oracles --------------------------------------------------------------------------------------

#: What is trained of the model of the oracles: of two dtypes, one of no dimension.
TRAINED = {"layer.w": ((3, 2), torch.float64), "b": ((), torch.float64), "v": ((4,), torch.float32)}
BUFFERS = ("mean", "count")
EVERYONE = ("ann", "bob", "cid", "dot")


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of a strategy: what went in, and what came out."""

    state: State
    memory: Memory
    replies: list[Reply]
    next_state: State
    next_memory: Memory


def play(strategy: Strategy, rounds: int = 4, begin: Memory | None = None) -> list[Turn]:
    """Some rounds of random replies of three sites of four, of which two are stale.

    Nothing that is passed in is written to, and names, shapes and dtypes stay: that is checked for
    whoever plays.
    """
    generator = torch.Generator().manual_seed(7)
    state: State = _model(generator)
    memory: Memory = strategy.begin(state)
    turns = []
    for number in range(rounds):
        names = sorted(EVERYONE[(number + place) % len(EVERYONE)] for place in range(3))
        replies = [_reply(name, state, place, generator) for place, name in enumerate(names)]
        given = copy.deepcopy((state, memory, replies))
        next_state, next_memory = strategy.aggregate(state, memory, replies, BUFFERS)
        assert_same(state, given[0])
        assert_same(memory, given[1])
        for reply, before in zip(replies, given[2], strict=True):
            assert_same(reply.state, before.state)
            assert_same(reply.given or {}, before.given or {})
        assert _kinds(next_state) == _kinds(state)
        turns.append(Turn(state, memory, replies, next_state, next_memory))
        state, memory = next_state, next_memory
    return turns


def _model(generator: torch.Generator) -> dict[str, torch.Tensor]:
    model = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, (shape, dtype) in TRAINED.items()
    }
    model["mean"] = torch.randn(2, generator=generator)
    model["count"] = torch.randint(0, 100, (), generator=generator)
    return model


def _reply(name: str, state: State, staleness: int, generator: torch.Generator) -> Reply:
    noise, old = _model(generator), _model(generator)
    rows, steps = torch.randint(1, 20, (2,), generator=generator).tolist()
    return Reply(
        name,
        {key: noise[key] if key in BUFFERS else state[key] + noise[key] / 4 for key in state},
        rows,
        steps,
        staleness=staleness,
        given=old if staleness else None,
        loss_before=float(torch.rand((), generator=generator)) + 0.1,
    )


def _kinds(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def assert_same(some: State, other: State) -> None:
    """Bit for bit."""
    assert some.keys() == other.keys()
    for name, value in some.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def flat(value: torch.Tensor) -> list[float]:
    """Its numbers as Python's."""
    return value.flatten().tolist()


def assert_numbers(value: torch.Tensor, numbers: Iterable[float]) -> None:
    """The tensor holds these, as nearly as its dtype can after some sums."""
    near = 1e-10 if value.dtype == torch.float64 else 2e-5
    assert flat(value) == pytest.approx(list(numbers), rel=near, abs=near)


def naive_mean(replies: Sequence[Reply], name: str, weights: Sequence[float]) -> list[float]:
    """``sum(n_k * w_k) / sum(n_k)``, number by number."""
    columns = zip(*(flat(reply.state[name]) for reply in replies), strict=True)
    return [
        math.fsum(weight * number for weight, number in zip(weights, column, strict=True))
        / math.fsum(weights)
        for column in columns
    ]


def assert_buffers_are_means(turns: Sequence[Turn]) -> None:
    """Weighted by rows; counts are rounded."""
    for turn in turns:
        rows = [reply.rows for reply in turn.replies]
        assert_numbers(turn.next_state["mean"], naive_mean(turn.replies, "mean", rows))
        assert turn.next_state["count"].item() == round(naive_mean(turn.replies, "count", rows)[0])


# --- training -------------------------------------------------------------------------------------

Data: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def loss(state: State, site: Data) -> float:
    """Half the mean squared error of a linear model."""
    x, y = site
    return float((x @ state["w"] - y).square().mean()) / 2


def slope(w: torch.Tensor, site: Data) -> torch.Tensor:
    """The gradient of that."""
    x, y = site
    return x.T @ (x @ w - y) / len(y)


def together(sites: Sequence[Data]) -> Data:
    """The rows of all."""
    return torch.cat([x for x, _ in sites]), torch.cat([y for _, y in sites])


def overall(state: State, sites: Sequence[Data]) -> float:
    """The loss over the rows of all sites."""
    return loss(state, together(sites))


def best(sites: Sequence[Data]) -> State:
    """Where that is least."""
    x, y = together(sites)
    return {"w": torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)}


@dataclass(frozen=True, slots=True)
class Local:
    """How sites train: so many steps of gradient descent over all of their rows."""

    lr: float
    steps: int

    def train(self, state: State, site: Data, terms: LocalTerms) -> State:
        """From ``state`` on."""
        begun, added = state["w"], terms.correction.get("w", torch.zeros_like(state["w"]))
        w = begun
        for _ in range(self.steps):
            w = w - self.lr * (slope(w, site) + terms.proximal * (w - begun) + added)
        return {"w": w}

    def reply(
        self, strategy: Strategy, memory: Memory, state: State, name: str, site: Data
    ) -> Reply:
        """What a site reports, as strategies want it."""
        rows = len(site[1])
        if strategy.wants_gradients:
            return Reply(name, {"w": slope(state["w"], site)}, rows, steps=0)
        before = loss(state, site) if strategy.wants_loss_before else None
        trained = self.train(state, site, strategy.local_terms(memory, name))
        return Reply(name, trained, rows, self.steps, loss_before=before)


def zeros(sites: Sequence[Data]) -> State:
    """The linear model that training begins with."""
    x = sites[0][0]
    return {"w": torch.zeros(x.shape[1], dtype=x.dtype)}


def train(
    strategy: Strategy,
    sites: Sequence[Data],
    local: Local,
    rounds: int,
    *,
    each: int | None = None,
    seed: int = 0,
) -> Iterator[State]:
    """The models of some rounds, the first one included.

    Args:
        each: so many sites take part in a round, drawn at random; else all.
    """
    generator = torch.Generator().manual_seed(seed)
    state = zeros(sites)
    memory = strategy.begin(state)
    yield state
    for _ in range(rounds):
        chosen = sorted(torch.randperm(len(sites), generator=generator).tolist()[:each])
        replies = [local.reply(strategy, memory, state, str(i), sites[i]) for i in chosen]
        state, memory = strategy.aggregate(state, memory, replies)
        yield state


def trained(*arguments: Any, **options: Any) -> State:
    """The last of these models."""
    *_, last = train(*arguments, **options)
    return last


def train_without_waiting(
    strategy: Strategy, sites: Sequence[Data], local: Local, steps: int, *, seed: int = 0
) -> tuple[list[State], list[int]]:
    """All sites train all the time, and any may be the next to be done.

    Returns:
        The models, the first one included, and how stale the updates were.
    """
    generator = torch.Generator().manual_seed(seed)
    states, memory = [zeros(sites)], strategy.begin(zeros(sites))
    since = [0] * len(sites)
    waiting: list[tuple[int, Reply]] = []
    stale: list[int] = []
    while len(states) <= steps:
        index = int(torch.randint(len(sites), (), generator=generator))
        begun = since[index]
        reply = local.reply(strategy, memory, states[begun], str(index), sites[index])
        waiting.append((begun, reply))
        if len(waiting) >= strategy.min_replies:
            replies = [_aged(reply, begun, states) for begun, reply in waiting]
            stale += [reply.staleness for reply in replies]
            state, memory = strategy.aggregate(states[-1], memory, replies)
            states.append(state)
            waiting = []
        since[index] = len(states) - 1
    return states, stale


def _aged(reply: Reply, begun: int, states: Sequence[State]) -> Reply:
    staleness = len(states) - 1 - begun
    return Reply(
        reply.site,
        reply.state,
        reply.rows,
        reply.steps,
        staleness=staleness,
        given=states[begun] if staleness else None,
    )


def rounds_to(goal: float, states: Iterable[State], sites: Sequence[Data]) -> float:
    """The first of the models whose overall loss is as low as that; infinity if none is."""
    rows = together(sites)
    return next((n for n, state in enumerate(states) if loss(state, rows) <= goal), math.inf)


def differing(
    count: int = 6,
    rows: int = 30,
    columns: int = 4,
    *,
    apart: float = 1.0,
    scales: Sequence[float] | None = None,
    seed: int = 0,
) -> list[Data]:
    """Sites of least squares whose best models lie apart, and whose columns differ in scale.

    Args:
        apart: standard deviation of the sites' best models around a common one.
        scales: of the columns at every site; else each site has its own ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common, sites = normal(columns), []
    for _ in range(count):
        own = normal(columns).exp() if scales is None else torch.tensor(scales).double()
        x = normal(rows, columns) * own
        sites.append((x, x @ (common + apart * normal(columns)) + 0.1 * normal(rows)))
    return sites


def through_a_file(memory: Mapping[str, torch.Tensor], path: str) -> Memory:
    """As a checkpoint keeps it."""
    from safetensors.torch import load_file, save_file

    if not memory:  # a file of no tensors is none
        return {}
    save_file({name: value.contiguous() for name, value in memory.items()}, path)
    return load_file(path)
