"""What is answered here, and what torch does in Python with a pointer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wsfed
from tests.pointers.oracle import assert_same, assert_same_bits, assert_same_state
from wsfed import sync

INITS: dict[str, Callable[[Any], Any]] = {
    "uniform_": lambda w: nn.init.uniform_(w, -0.5, 0.5),
    "normal_": lambda w: nn.init.normal_(w, 1.0, 0.5),
    "trunc_normal_": lambda w: nn.init.trunc_normal_(w, std=0.5),
    "constant_": lambda w: nn.init.constant_(w, 0.25),
    "ones_": nn.init.ones_,
    "zeros_": nn.init.zeros_,
    "eye_": nn.init.eye_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "xavier_normal_": nn.init.xavier_normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "kaiming_uniform_ with a": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
    "kaiming_uniform_ for tanh": lambda w: nn.init.kaiming_uniform_(
        w, mode="fan_out", nonlinearity="tanh"
    ),
    "kaiming_normal_": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", INITS)
def test_a_remote_parameter_is_initialised_as_a_local_one(
    name: str, bob: sync.VirtualWorker
) -> None:
    local = nn.Parameter(torch.empty(4, 3).fill_(7.0))
    remote = nn.ParameterList([nn.Parameter(local.detach().clone())])
    bob.send(remote)
    torch.manual_seed(3)
    bob.manual_seed(3)
    assert INITS[name](remote[0]) is remote[0]
    INITS[name](local)
    assert_same_bits(remote[0], local)
    assert remote[0].is_leaf
    assert remote[0].requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 4),
        lambda: nn.Conv2d(1, 2, 3),
        lambda: nn.LSTM(3, 4),
        lambda: nn.BatchNorm1d(3),
        lambda: nn.Embedding(4, 3, padding_idx=1),
        lambda: nn.LayerNorm(3),
        lambda: nn.MultiheadAttention(4, 2),
    ],
    ids=["Linear", "Conv2d", "LSTM", "BatchNorm1d", "Embedding", "LayerNorm", "Attention"],
)
def test_a_remote_layer_begins_anew_as_a_local_one(
    make: Callable[[], nn.Module], bob: sync.VirtualWorker
) -> None:
    local = make()
    remote = bob.send(copy.deepcopy(local))
    torch.manual_seed(3)
    bob.manual_seed(3)
    for each in (local, remote):
        getattr(each, "reset_parameters", getattr(each, "_reset_parameters", None))()
    assert_same_state(remote, local)


RANDOM: dict[str, Callable[[Any], Any]] = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 10),
    "bernoulli": torch.bernoulli,
    "bernoulli_": lambda x: x.bernoulli_(0.3),
    "multinomial": lambda x: torch.multinomial(x, 3),
    "normal": torch.normal,
    "normal_": lambda x: x.normal_(),
    "exponential_": lambda x: x.exponential_(),
    "random_": lambda x: x.random_(100),
    "poisson": torch.poisson,
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_those_of_the_same_seed(name: str, bob: sync.VirtualWorker) -> None:
    x = torch.full((4, 5), 0.5)
    remote = bob.send(x)
    for seed in (0, 1):
        torch.manual_seed(seed)
        bob.manual_seed(seed)
        for _ in range(2):
            # A virtual worker lends its state to the generator that this thread draws from next.
            got = RANDOM[name](remote).get()
            assert_same_bits(got, RANDOM[name](x))


def test_two_workers_draw_from_generators_of_their_own(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3), torch.rand(3)
    for worker in (bob, alice):
        worker.manual_seed(0)
    x, y = bob.send(torch.ones(3)), alice.send(torch.ones(3))
    first = torch.rand_like(x), torch.rand_like(y)
    second = torch.rand_like(x), torch.rand_like(y)
    for each in first:
        assert_same_bits(each, expected[0])
    for each in second:
        assert_same_bits(each, expected[1])


def test_a_generator_of_this_side_is_refused(bob: sync.VirtualWorker) -> None:
    with pytest.raises((TypeError, wsfed.WsfedError), match=r"[Gg]enerator"):
        bob.send(torch.ones(3)).normal_(generator=torch.Generator())


def test_a_session_without_a_seed_is_not_predictable() -> None:
    drawn = []
    for _ in range(2):
        with sync.VirtualWorker("bob") as bob:
            torch.manual_seed(0)
            drawn.append(torch.rand_like(bob.send(torch.ones(8))).get())
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("word", ["cuda", "mps"])
def test_a_pointer_stays_on_its_workers_device(word: str, bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    with pytest.raises((wsfed.WsfedError, RuntimeError)):
        x.to(word).get()


NEW: dict[str, Callable[[Any], Any]] = {
    "new_zeros": lambda x: x.new_zeros(2, 3),
    "new_ones": lambda x: x.new_ones((2, 3), dtype=torch.int64),
    "new_full": lambda x: x.new_full((2,), 3.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor([[1, 2], [3, 4]]),
    "new_tensor that requires grad": lambda x: x.new_tensor([1, 2], requires_grad=True),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.int64),
    "full_like": lambda x: torch.full_like(x, 2.5, requires_grad=True),
}


@pytest.mark.parametrize("name", NEW)
def test_a_new_tensor_is_beside_the_one_it_was_made_from(
    name: str, bob: sync.VirtualWorker
) -> None:
    x = torch.ones(3, dtype=torch.float64)
    made = NEW[name](bob.send(x))
    assert made.location is bob
    assert_same(made, NEW[name](x))


def test_a_new_tensor_is_written_to(bob: sync.VirtualWorker) -> None:
    x = torch.arange(3.0, requires_grad=True)
    remote = bob.send(x)
    for each in (x, remote):
        result = each.new_zeros(2, 3)
        result[0] = each * 2
        (result**2).sum().backward()
    assert_same_bits(remote.grad, x.grad)


def test_memory_that_nobody_has_written_to_is_zero(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, 3))
    for made in (torch.empty_like(x), x.new_empty(2, 3), x.new_empty((2, 3))):
        assert_same_bits(made, torch.zeros(2, 3))
    assert_same_bits(torch.empty_like(x, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))
