"""Modules travel in place, whole, and come home as they were."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wsfed
from tests.pointers.oracle import assert_same, assert_same_bits, assert_same_state
from wsfed import Pointer, sync


class Everything(nn.Module):
    """Parameters and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.recurrent = nn.GRU(3, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.list = nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))])
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("nothing", None)
        self.empty = nn.Parameter(torch.ones(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.tied(self.again(self.first(x)))) * self.frozen + self.kept
        return self.recurrent(x * self.passing + self.list[0])[0] * self.list[1]


@pytest.fixture
def model() -> Everything:
    torch.manual_seed(0)
    return Everything()


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_a_module_comes_home_as_it_went(model: Everything, bob: sync.VirtualWorker) -> None:
    twin = copy.deepcopy(model)
    before = [id(each) for each in tensors(model)]
    assert bob.send(model) is model
    assert all(isinstance(each, Pointer) for each in tensors(model))
    assert all(isinstance(each, nn.Parameter) for each in model.parameters())
    assert sync.get(model) is model
    assert [id(each) for each in tensors(model)] == before
    assert all(type(each) is nn.Parameter for each in model.parameters())
    assert all(type(each) is torch.Tensor for each in model.buffers())
    assert_same_state(model, twin)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_a_module_works_away_and_at_home(model: Everything, bob: sync.VirtualWorker) -> None:
    twin, x = copy.deepcopy(model), torch.randn(4, 3)
    for _ in range(2):
        bob.send(model)
        assert_same(model(bob.send(x)), twin(x))
        sync.get(model)
        assert_same(model(x), twin(x))
        assert_same_state(model, twin)


def test_tied_weights_stay_tied(model: Everything, bob: sync.VirtualWorker) -> None:
    bob.send(model)
    assert model.tied.weight is model.first.weight
    assert model.again is model.first
    with torch.no_grad():
        model.tied.weight.zero_()
    assert torch.count_nonzero(model.first.weight.get()) == 0
    sync.get(model)
    assert model.tied.weight is model.first.weight


def test_a_shared_weight_travels_once(bob: sync.VirtualWorker) -> None:
    model = nn.Sequential(*[nn.Linear(100, 100, bias=False)] * 3)
    bob.send(model)
    bob.flush()
    assert 40_000 <= bob.traffic[0] < 50_000


def test_flags_travel(model: Everything, bob: sync.VirtualWorker) -> None:
    model.eval()
    bob.send(model)
    assert not model.frozen.requires_grad
    assert not model.training
    model.first.requires_grad_(False)
    sync.get(model)
    assert not model.frozen.requires_grad
    assert not model.first.weight.requires_grad
    assert model.recurrent.weight_hh_l0.requires_grad


def test_a_buffer_that_is_not_persistent_travels(
    model: Everything, bob: sync.VirtualWorker
) -> None:
    bob.send(model)
    assert isinstance(model.passing, Pointer)
    assert "passing" not in model.state_dict()
    model.passing.add_(1)
    sync.get(model)
    assert torch.equal(model.passing, torch.full((3,), 2.0))


def test_gradients_travel_with_their_parameters(
    model: Everything, bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    twin, x = copy.deepcopy(model), torch.randn(4, 3)
    twin(x).sum().backward()
    model(x).sum().backward()
    bob.send(model)
    assert_same_state(model, twin)
    for each, where in ((model, bob.send(x)), (twin, x)):
        each(where).sum().backward()
    sync.move(model, alice)
    assert_same_state(model, twin)
    for each, where in ((model, alice.send(x)), (twin, x)):
        each(where).sum().backward()
    sync.get(model)
    assert_same_state(model, twin)


def test_gradients_can_stay_behind(model: Everything, bob: sync.VirtualWorker) -> None:
    bob.send(model)
    model(torch.randn(4, 3)).sum().backward()
    assert model.first.weight.grad is not None
    sync.get(model, grads=False)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_a_program_attached_to_a_parameter_stays(bob: sync.VirtualWorker) -> None:
    model = nn.Linear(2, 1)
    model.weight.group, model.bias.no_decay = "head", True
    bob.send(model)
    assert model.weight.group == "head"
    model.weight.seen = 3
    sync.get(model)
    assert (model.weight.group, model.weight.seen, model.bias.no_decay) == ("head", 3, True)
    assert not hasattr(model.weight, "_handle")


def test_an_attribute_is_not_left_on_the_way(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    model = nn.Linear(2, 1)
    model.weight.group = "head"
    bob.send(model)
    sync.move(model, alice)
    sync.get(model)
    assert model.weight.group == "head"


def test_an_optimizer_made_before_holds_the_same_parameters(bob: sync.VirtualWorker) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    bob.send(model)
    assert optimizer.param_groups[0]["params"][0] is model.weight
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = model.weight.get()
    sync.get(model)
    assert_same_bits(model.weight, before)
    assert optimizer.param_groups[0]["params"][0] is model.weight


def test_a_recurrent_layer_holds_its_weights_afterwards(bob: sync.VirtualWorker) -> None:
    layer = nn.LSTM(2, 3)
    for _ in range(2):
        bob.send(layer)
        assert layer._flat_weights[0] is layer.weight_ih_l0
        assert isinstance(layer(torch.ones(4, 2))[0], Pointer)
        layer.flatten_parameters()
        sync.get(layer)
        assert layer._flat_weights[0] is layer.weight_ih_l0
        assert type(layer(torch.ones(4, 2))[0]) is torch.Tensor
        assert len(layer._flat_weight_refs) == 4


def test_a_module_moves_from_worker_to_worker(
    model: Everything, bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    twin, x = copy.deepcopy(model), torch.randn(4, 3)
    bob.send(model)
    for worker in (alice, bob, bob, alice):
        assert sync.move(model, worker) is model
        assert model.first.weight.location is worker
        assert_same(model(worker.send(x)), twin(x))
    sync.get(model)
    assert_same_state(model, twin)


def test_sending_a_remote_module_moves_it(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    model = bob.send(nn.Linear(2, 1))
    alice.send(model)
    assert model.weight.location is alice
    alice.send(model)
    assert model.weight.location is alice


def test_a_copy_of_a_module_is_another_module(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    model = bob.send(nn.Linear(2, 1))
    here, there = sync.copy(model), sync.copy(model, alice)
    assert here.weight.location is bob
    assert there.weight.location is alice
    expected = model.weight.get()
    with torch.no_grad():
        model.weight.zero_()
    assert_same_bits(here.weight, expected)
    assert_same_bits(there.weight, expected)


def test_state_dicts_come_and_go(model: Everything, bob: sync.VirtualWorker) -> None:
    twin = copy.deepcopy(model)
    bob.send(model)
    state = model.state_dict()
    assert all(isinstance(each, Pointer) for each in state.values())
    home = sync.get(state)
    assert isinstance(home, OrderedDict)
    fresh = Everything()
    fresh.load_state_dict(home)
    assert_same_bits(fresh.first.weight, twin.first.weight.detach())
    changed = {name: value + 1 for name, value in twin.state_dict().items()}
    model.load_state_dict(changed)
    assert_same_bits(model.first.weight, changed["first.weight"])
    assert isinstance(model.first.weight, Pointer)
    fresh.load_state_dict(changed)
    other = bob.send(Everything())
    other.load_state_dict(model.state_dict())
    assert_same_bits(other.norm.weight, changed["norm.weight"])


def test_a_pointer_is_not_loaded_into_a_local_module(bob: sync.VirtualWorker) -> None:
    remote, local = bob.send(nn.Linear(2, 1)), nn.Linear(2, 1)
    before = local.weight.detach().clone()
    with pytest.raises(RuntimeError, match="local tensor"):
        local.load_state_dict(remote.state_dict())
    assert_same_bits(local.weight, before)


def test_a_half_sent_module_can_be_sent(bob: sync.VirtualWorker) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    bob.send(model[0])
    assert isinstance(model[0].weight, Pointer)
    assert not isinstance(model[1].weight, Pointer)
    with pytest.raises(wsfed.PointerError, match="its gradient would be lost"):
        model(torch.ones(1, 2))
    bob.send(model)
    assert model(torch.ones(1, 2)).location is bob
    sync.get(model)


def test_the_parts_of_a_module_may_be_on_two_workers(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    twin, x = copy.deepcopy(model), torch.ones(1, 2)
    bob.send(model[0])
    alice.send(model[1])
    with pytest.raises(wsfed.NotCollocated):
        model(bob.send(x))
    with torch.no_grad():
        assert_same_bits(model[1](model[0](bob.send(x)).move(alice)), twin(x))
    sync.get(model)
    assert_same_state(model, twin)


# --- what cannot travel --------------------------------------------------------------------------


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


def test_parameters_in_a_living_graph_are_not_exchanged(bob: sync.VirtualWorker) -> None:
    model = two_layers()
    loss = model(torch.ones(1, 2)).sum()
    with pytest.raises(wsfed.PointerError, match="part of a local graph"):
        bob.send(model)
    assert not any(isinstance(each, Pointer) for each in model.parameters())
    loss.backward()
    assert model[0].weight.grad is not None


def test_a_loss_that_is_done_with_does_not_keep_its_module_here(bob: sync.VirtualWorker) -> None:
    model = two_layers()
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    bob.send(model)
    assert all(isinstance(each, Pointer) for each in model.parameters())
    assert loss.item() == loss.item()


def test_a_graph_whose_module_has_gone_is_not_gone_through(bob: sync.VirtualWorker) -> None:
    model = nn.Linear(2, 1)  # its graph needs no values of its weights
    loss = model(torch.ones(1, 2)).sum()
    bob.send(model)
    with pytest.raises(RuntimeError, match="poisoned by swap_tensors"):
        loss.backward()


@pytest.mark.parametrize("place", [0, 1])
def test_parameters_that_are_weakly_referenced_are_not_exchanged(
    place: int, bob: sync.VirtualWorker
) -> None:
    model = two_layers()
    reference = weakref.ref(model[place].weight)
    with pytest.raises(wsfed.PointerError, match="weakly referenced"):
        bob.send(model)
    assert not any(isinstance(each, Pointer) for each in model.parameters())
    assert reference() is model[place].weight


def test_a_module_that_cannot_come_home_stays_whole(bob: sync.VirtualWorker) -> None:
    model = bob.send(two_layers())
    reference = weakref.ref(model[1].weight)
    with pytest.raises(wsfed.PointerError, match="weakly referenced"):
        sync.get(model)
    assert all(isinstance(each, Pointer) for each in model.parameters())
    del reference
    sync.get(model)


@pytest.mark.parametrize("value", [3, "text", [], None, [1, 2]], ids=str)
def test_what_holds_no_tensor_is_not_sent(value: Any, bob: sync.VirtualWorker) -> None:
    with pytest.raises(TypeError, match="no tensor, module or collection"):
        bob.send(value)


def test_an_optimizer_is_not_sent(bob: sync.VirtualWorker) -> None:
    with pytest.raises(TypeError, match="its state follows its parameters"):
        bob.send(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0))


def test_what_is_here_cannot_be_got() -> None:
    with pytest.raises(wsfed.PointerError, match="nothing of this is on a worker"):
        sync.get(nn.Linear(2, 1))
    with pytest.raises(TypeError, match="no pointer in this list"):
        sync.get([torch.ones(2)])
    model = nn.Linear(2, 1)
    with pytest.raises(wsfed.PointerError, match="nothing of this optimizer's state"):
        sync.get(torch.optim.Adam(model.parameters()))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse_coo"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "nested"),
        (lambda: torch.ones(2, device="meta"), "meta"),
    ],
    ids=["sparse", "nested", "meta"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_without_a_wire_form_says_so(
    make: Callable[[], torch.Tensor], why: str, bob: sync.VirtualWorker
) -> None:
    with pytest.raises(wsfed.WsfedError, match=why):
        bob.send(make())
    assert torch.equal(bob.send(torch.ones(2)).get(), torch.ones(2))


# --- collections ---------------------------------------------------------------------------------


def test_collections_travel(bob: sync.VirtualWorker, alice: sync.VirtualWorker) -> None:
    batch = {"x": torch.ones(2), "pair": (torch.zeros(1), [torch.arange(3)]), "name": "first"}
    there = bob.send(batch)
    assert there["name"] == "first"
    assert isinstance(there["pair"][1][0], Pointer)
    assert_same(sync.get(there), batch)
    moved = sync.move({"x": there["x"]}, alice)
    assert moved["x"].location is alice
    twin = sync.copy([there["x"]])
    there["x"].zero_()
    assert torch.equal(twin[0].get(), torch.ones(2))
    assert_same(sync.get([moved["x"], torch.ones(1), 5]), [torch.ones(2), torch.ones(1), 5])


def test_pointers_of_two_workers_come_home_together(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    both = [bob.send(torch.ones(1)), alice.send(torch.zeros(1))]
    assert_same(sync.get(both), [torch.ones(1), torch.zeros(1)])


def test_a_local_tensor_is_not_moved(bob: sync.VirtualWorker) -> None:
    with pytest.raises(wsfed.PointerError, match="send it first"):
        sync.move([torch.ones(1)], bob)


# --- awaited -------------------------------------------------------------------------------------


async def test_a_module_is_awaited(model: Everything) -> None:
    twin, x = copy.deepcopy(model), torch.randn(4, 3)
    async with wsfed.VirtualWorker("bob") as bob, wsfed.VirtualWorker("alice") as alice:
        bob.send(model)
        result = model(bob.send(x))
        result.sum().backward()
        wsfed.move(model, alice)
        assert_same(await model(alice.send(x)).get(), twin(x).detach())
        twin(x)
        twin = copy.deepcopy(twin)
        assert await wsfed.get(model) is model
        assert type(model.first.weight) is nn.Parameter
        assert await wsfed.get([bob.send(x), 1]) is not None


async def test_a_module_on_a_lost_worker_stays_a_pointer(model: Everything) -> None:
    async with wsfed.VirtualWorker("bob") as bob:
        bob.send(model)
    with pytest.raises(wsfed.WsfedError):
        await wsfed.get(model)
    assert isinstance(model.first.weight, Pointer)


async def test_a_module_comes_home_whole_or_not_at_all(carol: wsfed.VirtualWorker) -> None:
    model = carol.send(nn.Linear(2, 1))
    with torch.no_grad():
        lost = carol.send(torch.ones(3))[carol.send(torch.tensor([9]))]
        model.bias.copy_(lost)
    with pytest.raises(wsfed.RemoteError):
        await wsfed.get(model)
    assert isinstance(model.weight, Pointer)
    assert isinstance(model.bias, Pointer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_remote_module_is_converted_in_place(dtype: torch.dtype, bob: sync.VirtualWorker) -> None:
    local = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    remote, x = copy.deepcopy(local), torch.randn(5, 3)
    bob.send(remote)
    for module, data in ((local, x), (remote, bob.send(x))):
        parameters = list(module.parameters())
        (module(data) ** 2).sum().backward()
        module.to(dtype)
        assert list(map(id, module.parameters())) == list(map(id, parameters))
        (module(data.to(dtype)) ** 2).sum().backward()
    assert_same_state(remote, local)
