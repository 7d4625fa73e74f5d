"""What a pointer is to Python: metadata, values, copies, names."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wsfed
from tests.pointers.oracle import assert_same_bits
from wsfed import sync

#: What Python asks for, and what it is of ``tensor(2.5)``.
VALUES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "bool": (bool, True),
    "int": (int, 2),
    "float": (float, 2.5),
    "complex": (complex, 2.5 + 0j),
    "item": (lambda p: p.item(), 2.5),
    "tolist": (lambda p: p.tolist(), 2.5),
    "numpy": (lambda p: p.numpy(), np.float32(2.5)),
    "np.asarray": (np.asarray, np.float32(2.5)),
    "equal": (lambda p: torch.equal(p, torch.tensor(2.5)), True),
    "allclose": (lambda p: torch.allclose(p, torch.tensor(2.5)), True),
    "in": (lambda p: 2.5 in p, True),
    "if": (lambda p: "yes" if p > 2 else "no", "yes"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_there_when_python_wants_it_in_the_blocking_world(
    name: str, bob: sync.VirtualWorker
) -> None:
    ask, expected = VALUES[name]
    assert ask(bob.send(torch.tensor(2.5))) == expected


@pytest.mark.parametrize("name", VALUES)
async def test_a_value_has_to_be_awaited_in_the_async_world(
    name: str, carol: wsfed.VirtualWorker
) -> None:
    pointer = carol.send(torch.tensor(2.5))
    with pytest.raises(wsfed.ValueNeeded, match=r"await pointer\.get") as caught:
        VALUES[name][0](pointer)
    assert "carol" in str(caught.value)
    assert "2.5" not in str(caught.value)


def test_lists_of_values_are_those_of_torch(bob: sync.VirtualWorker) -> None:
    x = torch.arange(6).reshape(2, 3)
    pointer = bob.send(x)
    assert pointer.tolist() == x.tolist()
    assert np.array_equal(pointer.numpy(), x.numpy())
    assert [int(each) for each in pointer[0]] == [0, 1, 2]
    assert list(range(5))[bob.send(torch.tensor(2))] == 2


async def test_awaiting_a_pointer_gives_its_value(carol: wsfed.VirtualWorker) -> None:
    pointer = carol.send(torch.arange(3.0))
    assert_same_bits(await pointer, torch.arange(3.0))
    assert_same_bits(await pointer.get(), torch.arange(3.0))
    assert_same_bits(await (pointer + 1), torch.arange(3.0) + 1)


async def test_several_gets_are_under_way_at_once(carol: wsfed.VirtualWorker) -> None:
    pointer = carol.send(torch.ones(2))
    asked = [(pointer * n).get() for n in range(20)]
    assert [(await each)[0].item() for each in asked] == list(range(20))


async def test_a_get_brings_the_value_of_its_moment(carol: wsfed.VirtualWorker) -> None:
    pointer = carol.send(torch.zeros(2))
    before = pointer.get()
    pointer.add_(1)
    assert_same_bits(await before, torch.zeros(2))
    assert_same_bits(await pointer.get(), torch.ones(2))


def test_a_pointer_of_a_blocking_worker_is_not_awaited(bob: sync.VirtualWorker) -> None:
    async def wait() -> None:
        await bob.send(torch.ones(2))

    with pytest.raises(wsfed.PointerError, match=r"pointer\.get\(\)"):
        wait().send(None)


def test_get_does_not_consume(bob: sync.VirtualWorker) -> None:
    pointer = bob.send(torch.ones(2))
    assert torch.equal(pointer.get(), pointer.get())
    mine = pointer.get()
    mine.zero_()
    assert torch.equal(pointer.get(), torch.ones(2))


def test_what_was_sent_may_change_afterwards(bob: sync.VirtualWorker) -> None:
    tensor = torch.ones(2)
    pointer = bob.send(tensor)
    tensor.zero_()
    assert torch.equal(pointer.get(), torch.ones(2))


# --- metadata ------------------------------------------------------------------------------------

METADATA: dict[str, Callable[[Any], Any]] = {
    "shape": lambda p: p.shape,
    "size": lambda p: p.size(),
    "size(0)": lambda p: p.size(0),
    "dim": lambda p: (p.dim(), p.ndim, p.ndimension()),
    "numel": lambda p: (p.numel(), p.nelement(), torch.numel(p)),
    "dtype": lambda p: p.dtype,
    "stride": lambda p: (p.stride(), p.stride(0)),
    "layout": lambda p: p.layout,
    "element_size": lambda p: (p.element_size(), p.itemsize, p.nbytes),
    "len": len,
    "is_contiguous": lambda p: (p.is_contiguous(), p.T.is_contiguous()),
    "is_floating_point": lambda p: (p.is_floating_point(), torch.is_complex(p)),
    "requires_grad": lambda p: (p.requires_grad, p.is_leaf, p.grad, p.grad_fn),
    "device": lambda p: (p.device, p.is_cpu, p.is_cuda, p.is_meta),
    "is_sparse": lambda p: (p.is_sparse, p.is_quantized, p.is_nested),
    "is_tensor": torch.is_tensor,
    "isinstance": lambda p: isinstance(p, torch.Tensor),
    "type": lambda p: p.is_signed(),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_that_of_the_tensor(name: str, bob: sync.VirtualWorker) -> None:
    tensor = torch.randn(3, 4)
    pointer = bob.send(tensor)
    bob.flush()
    sent = bob.traffic[0]
    if name != "is_contiguous":
        assert METADATA[name](pointer) == METADATA[name](tensor)
        assert bob.traffic[0] == sent
    else:
        assert METADATA[name](pointer) == METADATA[name](tensor)


def test_metadata_of_what_is_no_number_is_that_of_the_tensor(bob: sync.VirtualWorker) -> None:
    pointer = bob.send(torch.ones(2, 0, 3, dtype=torch.complex64))
    assert pointer.shape == (2, 0, 3)
    assert pointer.is_complex()
    assert pointer.numel() == 0
    with pytest.raises(TypeError, match="len\\(\\) of a 0-d tensor"):
        len(bob.send(torch.ones(())))


def test_a_pointer_knows_where_its_tensor_is(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2))
    y = x + 1
    assert x.location is bob
    assert y.location is bob
    assert x.owner == "me"
    assert isinstance(x.id_at_location, int)
    assert x.id_at_location != y.id_at_location
    assert x.is_alive()


def test_a_pointer_outlives_its_session_as_a_dead_one() -> None:
    with sync.VirtualWorker("bob") as bob:
        x = bob.send(torch.ones(2))
    assert not x.is_alive()
    assert x.shape == (2,)
    assert "bob" in repr(x)
    with pytest.raises(wsfed.WsfedError):
        x.get()
    with pytest.raises(wsfed.WsfedError):
        x + 1


# --- Python around it ----------------------------------------------------------------------------


def test_what_is_shown_of_a_pointer_holds_no_value(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.full((2, 3), 7.0, requires_grad=True))
    expected = f"<Pointer bob:{x.id_at_location} float32[2, 3], requires_grad=True>"
    assert repr(x) == str(x) == f"{x}" == expected
    assert f"{x:>80}" == expected.rjust(80)
    assert f"{x[0, 0]}".startswith("<Pointer bob:")
    assert f"{x[0, 0]:.3f}" == "7.000"  # asked for, in the blocking world


async def test_a_number_in_a_text_is_awaited_first(carol: wsfed.VirtualWorker) -> None:
    loss = carol.send(torch.tensor(0.25))
    with pytest.raises(wsfed.ValueNeeded, match=r"format '\.3f' needs the value"):
        f"{loss:.3f}"
    assert f"{await loss:.3f}" == "0.250"


async def test_what_is_wanted_of_an_unresolved_pointer_is_said(carol: wsfed.VirtualWorker) -> None:
    x = carol.send(torch.tensor([1.0, -1.0, 2.0]))
    positive = x[x > 0]
    for use, said in ((lambda: positive.shape, "shape"), (lambda: len(positive), r"len\(\)")):
        with pytest.raises(wsfed.ValueNeeded, match=rf"^{said} needs .*await pointer.resolve"):
            use()


def test_a_tensor_beside_another_is_made_of_a_pointer_or_of_what_is_here(
    bob: sync.VirtualWorker,
) -> None:
    x, y = bob.send(torch.ones(2)), bob.send(torch.tensor([1, 2], dtype=torch.int32))
    made = x.new_tensor(y, requires_grad=True)
    assert (made.dtype, made.requires_grad, made.is_leaf) == (torch.float32, True, True)
    assert torch.equal(made.get().detach(), torch.tensor([1.0, 2.0]))
    assert torch.equal(x.new_tensor([3, 4]).get(), torch.tensor([3.0, 4.0]))


def test_a_parameter_shows_no_value(bob: sync.VirtualWorker) -> None:
    layer = bob.send(nn.Linear(2, 3))
    assert "float32[3, 2]" in repr(layer.weight)
    assert "<Pointer bob:" in repr(dict(layer.named_parameters()))


def test_a_pointer_is_hashed_by_identity(bob: sync.VirtualWorker) -> None:
    x, y = bob.send(torch.ones(2)), bob.send(torch.ones(2))
    assert hash(x) == hash(x)
    assert {x: 1, y: 2}[x] == 1
    assert len({x, y, x}) == 2


def test_a_pointer_is_unpacked_and_iterated(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.arange(6.0).reshape(3, 2))
    a, b, c = x
    assert torch.equal(b.get(), torch.tensor([2.0, 3.0]))
    assert [row.shape for row in x] == [(2,)] * 3
    assert torch.equal(torch.stack([a, c]).get(), torch.tensor([[0.0, 1.0], [4.0, 5.0]]))
    assert torch.equal(reversed(x)[0].get(), torch.tensor([4.0, 5.0]))
    assert torch.equal(max(x[:, 0]).get(), torch.tensor(4.0))
    assert torch.equal(sum(x).get(), torch.tensor([6.0, 9.0]))
    assert [pair[1].shape for pair in zip(range(3), x, strict=True)] == [(2,)] * 3


async def test_a_pointer_is_unpacked_without_waiting(carol: wsfed.VirtualWorker) -> None:
    first, second = carol.send(torch.arange(4.0).reshape(2, 2))
    assert_same_bits(await (first + second), torch.tensor([2.0, 4.0]))


def test_a_number_is_not_iterated(bob: sync.VirtualWorker) -> None:
    with pytest.raises(TypeError, match="iteration over a 0-d tensor"):
        iter(bob.send(torch.ones(())))


def test_a_copy_of_pythons_is_the_same_tensor(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2))
    y = copy.copy(x)
    assert y is not x
    y.add_(1)
    assert torch.equal(x.get(), torch.full((2,), 2.0))
    del x
    bob.flush()
    assert torch.equal(y.get(), torch.full((2,), 2.0))


def test_a_deep_copy_is_a_tensor_of_its_own_on_the_worker(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, requires_grad=True))
    y, again = copy.deepcopy([x, x])
    assert y is again
    assert y.location is bob
    assert y.requires_grad
    assert y.is_leaf
    with torch.no_grad():
        y.add_(1)
    assert torch.equal(x.get(), torch.ones(2, requires_grad=True))
    assert torch.equal(y.get(), torch.full((2,), 2.0))


def test_a_deep_copy_of_a_result_is_torchs_own_error(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, requires_grad=True)) * 2
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(x)


def test_a_deep_copy_of_a_remote_module_is_a_module_of_its_own(bob: sync.VirtualWorker) -> None:
    model = bob.send(nn.Linear(2, 1))
    twin = copy.deepcopy(model)
    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight is not model.weight
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.count_nonzero(model.weight.get()) == 2
    assert torch.count_nonzero(twin.weight.get()) == 0


def test_a_pointer_is_not_pickled(bob: sync.VirtualWorker, tmp_path: Any) -> None:
    x = bob.send(torch.ones(2))
    with pytest.raises(wsfed.PointerError, match="cannot be pickled"):
        pickle.dumps(x)
    with pytest.raises(wsfed.PointerError, match="cannot be pickled"):
        torch.save({"x": x}, tmp_path / "x.pt")


# --- places --------------------------------------------------------------------------------------


def test_move_gives_a_pointer_on_the_other_worker(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    x = bob.send(torch.arange(3.0, requires_grad=True))
    y = x.move(alice)
    assert y.location is alice
    assert y.requires_grad
    assert y.is_leaf
    assert torch.equal((y * 2).get(), torch.tensor([0.0, 2.0, 4.0]))
    assert x.move(bob) is x


def test_a_chain_of_moves_ends_where_it_ends(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    x = bob.send(torch.arange(3.0))
    for worker in (alice, bob, alice, bob, alice):
        x = (x + 1).move(worker)
    assert x.location is alice
    assert torch.equal(x.get(), torch.arange(3.0) + 5)


async def test_moves_are_pipelined() -> None:
    async with wsfed.VirtualWorker("bob") as bob, wsfed.VirtualWorker("alice") as alice:
        x = bob.send(torch.arange(3.0))
        for worker in (alice, bob, alice):
            x = (x + 1).move(worker)
        y = x * 2 + alice.send(torch.ones(3))
        assert torch.equal(await y, (torch.arange(3.0) + 3) * 2 + 1)


async def test_a_move_of_what_failed_tells_of_the_failure() -> None:
    async with wsfed.VirtualWorker("bob") as bob, wsfed.VirtualWorker("alice") as alice:
        lost = bob.send(torch.ones(3))[bob.send(torch.tensor([5]))]
        moved = lost.move(alice) + 1
        with pytest.raises(wsfed.RemoteError):
            await moved
        assert torch.equal(await alice.send(torch.ones(2)), torch.ones(2))


def test_a_transposed_tensor_moves(bob: sync.VirtualWorker, alice: sync.VirtualWorker) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    moved = bob.send(tensor).t().move(alice)
    assert torch.equal(moved.get(), tensor.t())
    assert_same_bits(moved * 1, tensor.t().contiguous())


def test_a_copy_is_independent(bob: sync.VirtualWorker, alice: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2))
    here, there = x.copy(), x.copy(alice)
    x.zero_()
    assert here.location is bob
    assert there.location is alice
    assert torch.equal(here.get(), torch.ones(2))
    assert torch.equal(there.get(), torch.ones(2))


def test_a_tag_finds_a_tensor(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2)).tag("#data", "#small").describe("two ones")
    bob.send(torch.zeros(2)).tag("#data")
    found = bob.search("#data", "#small")
    assert len(found) == 1
    assert torch.equal(found[0].get(), torch.ones(2))
    assert bob.search("#nothing") == []
    del x


def test_what_a_search_found_outlives_the_first_pointer(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2)).tag("#data")
    (found,) = bob.search("#data")
    del x
    bob.flush()
    assert torch.equal((found + 1).get(), torch.full((2,), 2.0))


def test_what_is_no_worker_is_told(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2))
    with pytest.raises(TypeError, match="a worker is needed here, not str"):
        x.move("alice")


# --- shapes that depend on values, awaited -------------------------------------------------------


async def test_a_shape_that_depends_on_values_is_awaited(carol: wsfed.VirtualWorker) -> None:
    x = torch.tensor([-1.0, 2.0, -3.0, 4.0])
    pointer = carol.send(x)
    chosen = pointer[pointer > 0]
    assert "unresolved" in repr(chosen)
    for use in (
        lambda: chosen.shape,
        lambda: len(chosen),
        lambda: chosen + 1,
        lambda: chosen.requires_grad,
        lambda: torch.cat([pointer, chosen]),
    ):
        with pytest.raises(wsfed.ValueNeeded, match=r"await pointer\.resolve\(\)"):
            use()
    assert await chosen.resolve() is chosen
    assert chosen.shape == (2,)
    assert_same_bits(await (chosen + 1), torch.tensor([3.0, 5.0]))


async def test_an_unresolved_value_can_be_got(carol: wsfed.VirtualWorker) -> None:
    pointer = carol.send(torch.tensor([0, 2, 0, 3]))
    assert_same_bits(await pointer.nonzero(), torch.tensor([[1], [3]]))


async def test_gradients_go_through_a_resolved_pointer(carol: wsfed.VirtualWorker) -> None:
    x = torch.tensor([-1.0, 2.0, 3.0])
    pointer = carol.send(x.clone().requires_grad_())
    chosen = await (pointer[pointer > 0]).resolve()
    assert chosen.requires_grad
    assert not chosen.is_leaf
    (chosen**2).sum().backward()
    assert_same_bits(await pointer.grad, torch.tensor([0.0, 4.0, 6.0]))


async def test_resolving_what_failed_tells_of_the_failure(carol: wsfed.VirtualWorker) -> None:
    rows = carol.send(torch.ones(3))[carol.send(torch.tensor([7]))]
    chosen = rows[rows > 0]
    with pytest.raises(wsfed.RemoteError, match="out of bounds"):
        await chosen.resolve()


async def test_a_mask_writes_without_waiting(carol: wsfed.VirtualWorker) -> None:
    pointer = carol.send(torch.tensor([-1.0, 2.0]))
    pointer[pointer < 0] = 0.0
    assert_same_bits(await pointer, torch.tensor([0.0, 2.0]))
