"""Operations on pointers give what torch gives, or torch's own error before anything is sent."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.pointers.oracle import assert_same_bits, check
from wsfed import sync
from wsfed.pointers import calls
from wsfed.protocol import limits


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "cat": lambda x, y: torch.cat([x, y, x], dim=1),
    "stack": lambda x, y: torch.stack((x, y)),
    "hstack": lambda x, y: torch.hstack([x, y]),
    "where": lambda x, y: torch.where(x > y, x, y * 2),
    "where with a number": lambda x, y: torch.where(x > 0, y, 0.0),
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
    "matmul": lambda x, y: x @ y.T,
    "bmm": lambda x, y: torch.bmm(x[None], y[None].transpose(1, 2)),
    "outer": lambda x, y: torch.outer(x[0], y[0]),
    "tensordot": lambda x, y: torch.tensordot(x, y, dims=([0], [0])),
    "addmm": lambda x, y: torch.addmm(x, x @ y.T, y, beta=0.5, alpha=2),
    "pointwise": lambda x, y: (x.sin() + y.exp()) * x / (y.abs() + 1),
    "powers": lambda x, y: x**2 + y.abs() ** 0.5 + 2**y,
    "clamp": lambda x, y: x.clamp(min=-0.5).clamp(y, y + 1),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "maximum": lambda x, y: torch.maximum(x, y),
    "gather": lambda x, y: x.gather(1, y.argsort(1)),
    "scatter": lambda x, y: x.scatter(1, y.argsort(1), y),
    "index_select": lambda x, y: x.index_select(0, torch.tensor([1, 1, 0])),
    "index_add": lambda x, y: x.index_add(0, torch.tensor([0, 1, 0, 1]), y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, -1.0),
    "expand": lambda x, y: x[:, None].expand(4, 5, 3) + y[:, None],
    "broadcast_tensors": lambda x, y: torch.broadcast_tensors(x, y[:1]),
    "reshape": lambda x, y: x.t().reshape(2, -1) + y.view(-1, 6),
    "permute": lambda x, y: x.permute(1, 0) * y.mT,
    "flatten": lambda x, y: x.flatten() + y.ravel(),
    "unfold": lambda x, y: x.unfold(0, 2, 1),
    "roll and flip": lambda x, y: x.roll(1, 0) + y.flip([0, 1]),
    "pad": lambda x, y: F.pad(x, (1, 2)) + F.pad(y, (2, 1), value=3.0),
    "tril": lambda x, y: x.tril() + torch.triu(y),
    "diag": lambda x, y: (x @ y.T).diag(),
    "repeat": lambda x, y: x.repeat(2, 1) + y.tile(2, 1),
    "softmax": lambda x, y: x.softmax(-1) + F.log_softmax(y, dim=0),
    "norm": lambda x, y: x.norm() + torch.linalg.norm(y, dim=1),
    "normalize": lambda x, y: F.normalize(x) + F.layer_norm(y, (3,)),
    "cosine_similarity": lambda x, y: F.cosine_similarity(x, y),
    "cdist": lambda x, y: torch.cdist(x, y),
    "cumsum": lambda x, y: x.cumsum(0) + y.cumprod(1),
    "logsumexp": lambda x, y: x.logsumexp(1) + y.prod(1),
    "mean of several": lambda x, y: x.mean((0, 1)) + y.sum(dim=1, keepdim=True),
    "var": lambda x, y: x.var(0) + y.std(dim=0, correction=0),
    "trace and det": lambda x, y: (x.T @ y).trace() + torch.linalg.det(x.T @ y),
    "inverse": lambda x, y: torch.linalg.inv(x.T @ x + torch.eye(3)),
    "solve": lambda x, y: torch.linalg.solve(x.T @ x + torch.eye(3), y.T),
    "complex": lambda x, y: torch.fft.rfft(x).abs() + torch.complex(x, y).abs()[:, :2],
    "zeros_like": lambda x, y: torch.zeros_like(x) + torch.ones_like(y) * x,
    "new_zeros": lambda x, y: x + y.new_zeros(4, 3) + y.new_full((3,), 2.0),
    "grouped convolution": lambda x, y: F.conv1d(x[None], y[:, None, :2], groups=4),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_torch(name: str, bob: sync.VirtualWorker) -> None:
    check(bob, OPERATIONS[name], leaf(4, 3), leaf(4, 3, seed=1))


SEVERAL: dict[str, Callable[[Any], Any]] = {
    "max": lambda x: x.max(dim=1),
    "min": lambda x: torch.min(x, 0, keepdim=True),
    "median": lambda x: x.median(1),
    "mode": lambda x: x.mode(1),
    "topk": lambda x: x.topk(2, dim=1),
    "kthvalue": lambda x: x.kthvalue(2),
    "sort": lambda x: x.sort(dim=0, descending=True),
    "cummax": lambda x: x.cummax(0),
    "aminmax": lambda x: x.aminmax(),
    "var_mean": lambda x: torch.var_mean(x, dim=1),
    "std_mean": lambda x: torch.std_mean(x, 0),
    "split": lambda x: x.split([1, 3]),
    "chunk": lambda x: x.chunk(2),
    "tensor_split": lambda x: torch.tensor_split(x, 3),
    "unbind": lambda x: x.unbind(1),
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),
    "frexp": torch.frexp,
    "qr": lambda x: torch.linalg.qr(x),
    "lu": lambda x: torch.linalg.lu_factor(x @ x.T + torch.eye(4)),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_results_come_as_torch_gives_them(name: str, bob: sync.VirtualWorker) -> None:
    check(bob, SEVERAL[name], leaf(4, 3))


def test_results_keep_their_names(bob: sync.VirtualWorker) -> None:
    found = bob.send(torch.tensor([[1.0, 3.0, 2.0]])).max(dim=1)
    assert type(found) is torch.return_types.max
    assert found.values.get().item() == 3
    assert found.indices.get().item() == 1


INPLACE: dict[str, Callable[[Any, Any], Any]] = {
    "add_": lambda x, y: x.add_(y, alpha=2),
    "+=": operator.iadd,
    "-=": operator.isub,
    "*=": operator.imul,
    "/=": operator.itruediv,
    "**=": lambda x, y: operator.ipow(x, 2),
    "mul_ by a number": lambda x, y: x.mul_(0.5).add_(y),
    "zero_": lambda x, y: x.zero_(),
    "fill_": lambda x, y: x.fill_(2.5),
    "copy_": lambda x, y: x.copy_(y),
    "clamp_": lambda x, y: x.clamp_(-0.5, 0.5),
    "addcmul_": lambda x, y: x.addcmul_(x.detach() * 1, y, value=0.5),
    "lerp_": lambda x, y: x.lerp_(y, 0.25),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0, 0.0),
    "index_fill_": lambda x, y: x.index_fill_(0, torch.tensor([1]), 7.0),
    "scatter_": lambda x, y: x.scatter_(1, y.argsort(1), y),
    "relu_": lambda x, y: F.relu(x, inplace=True),
    "t_": lambda x, y: x.t_(),
    "unsqueeze_": lambda x, y: x.unsqueeze_(0),
    "squeeze_": lambda x, y: x.unsqueeze_(0).squeeze_(0),
    "transpose_": lambda x, y: x.transpose_(0, 1),
    "a view": lambda x, y: x[1:].mul_(2),
    "a view of a view": lambda x, y: x.view(-1)[2:5].copy_(y.flatten()[:3]),
    "a row": lambda x, y: x[0].zero_(),
}


@pytest.mark.parametrize("name", INPLACE)
def test_an_operation_in_place_is_that_of_torch(name: str, bob: sync.VirtualWorker) -> None:
    def write(x: torch.Tensor, y: torch.Tensor) -> Any:
        whole = x * 1
        result = INPLACE[name](whole, y)
        return result, whole

    check(bob, write, leaf(4, 3), leaf(4, 3, seed=1))


def test_an_operation_in_place_gives_the_same_pointer(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    assert x.add_(1) is x
    assert x.unsqueeze_(0) is x
    assert x.shape == (1, 3)
    before = x
    x += 1
    assert x is before


def test_writing_in_place_to_a_leaf_is_torchs_own_error(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        x.add_(1)
    with torch.no_grad():
        x.add_(1)
    assert torch.equal(x.get(), torch.full((3,), 2.0))


OPERATORS: dict[str, Callable[[Any], Any]] = {
    "2 - p": lambda p: 2 - p,
    "1 / p": lambda p: 1 / p,
    "2 * p + 1": lambda p: 2 * p + 1,
    "2 ** p": lambda p: 2**p,
    "2.5 // p": lambda p: 2.5 // p.detach(),
    "7 % p": lambda p: 7 % p.detach(),
    "tensor - p": lambda p: torch.ones(3) - p,
    "tensor / p": lambda p: torch.ones(3) / p,
    "tensor @ p": lambda p: torch.ones(2, 3) @ p,
    "-p": lambda p: -p,
    "+p": lambda p: +p,
    "abs(p)": abs,
    "p // 2": lambda p: p.detach() // 2,
    "p % 2": lambda p: p.detach() % 2,
    "round": lambda p: p.round() + p.round(decimals=1),
    "divmod": lambda p: (p.detach().floor_divide(2), p.fmod(2)),
    "p == 1": lambda p: p == 1,
    "p != 1": lambda p: p != 1,
    "p < 1": lambda p: p < 1,
    "1 < p": lambda p: 1 < p,  # noqa: SIM300
    "p >= tensor": lambda p: p >= torch.ones(3),
    "tensor == p": lambda p: torch.ones(3) == p,
    "~": lambda p: ~(p > 1) & (p < 3) | (p == 2),
    "^": lambda p: (p > 1) ^ (p > 2),
    "<<": lambda p: p.detach().int() << 2,
    "2 >> p": lambda p: 8 >> p.detach().int(),
    "isnan": lambda p: p.isnan() | torch.isfinite(p),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_that_of_torch(name: str, bob: sync.VirtualWorker) -> None:
    check(bob, OPERATORS[name], torch.tensor([1.0, 2.0, 3.0], requires_grad=True))


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "to(float64)": lambda p: p.to(torch.float64),
    "double": lambda p: p.double(),
    "half": lambda p: p.half(),
    "bfloat16": lambda p: p.bfloat16(),
    "int": lambda p: p.int(),
    "long": lambda p: p.long(),
    "bool": lambda p: p.bool(),
    "type": lambda p: p.type(torch.float64),
    "type_as": lambda p: p.type_as(torch.ones(1, dtype=torch.float64)),
    "to(other)": lambda p: p.to(torch.ones(1, dtype=torch.float64)),
    'to("cpu")': lambda p: p.to("cpu") * 2,
    'to("cpu", dtype)': lambda p: p.to("cpu", torch.float64),
    "to(device=)": lambda p: p.to(device=torch.device("cpu"), dtype=torch.float64),
    "to its own device": lambda p: p.to(p.device) * 2,
    "cpu": lambda p: p.cpu() * 2,
    "complex": lambda p: p.to(torch.complex64).abs(),
    "view(dtype)": lambda p: p.detach().view(torch.int32),
    "contiguous": lambda p: p.t().contiguous(),
    "clone": lambda p: p.clone(),
    "channels last": lambda p: p[None, None].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_is_that_of_torch(name: str, bob: sync.VirtualWorker) -> None:
    check(bob, CONVERSIONS[name], leaf(4, 3))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64],
    ids=str,
)
def test_a_tensor_comes_back_as_it_went(dtype: torch.dtype, bob: sync.VirtualWorker) -> None:
    for tensor in (
        torch.arange(6).reshape(2, 3).to(dtype),
        torch.ones((), dtype=dtype),
        torch.ones(0, 3, dtype=dtype),
        torch.arange(6).to(dtype).reshape(2, 3).t(),
        torch.ones(1, dtype=dtype).expand(3),
    ):
        pointer = bob.send(tensor)
        assert (pointer.shape, pointer.dtype) == (tensor.shape, tensor.dtype)
        assert_same_bits(pointer.get(), tensor)


# --- local tensors in operations -----------------------------------------------------------------


def test_a_local_tensor_travels_along(bob: sync.VirtualWorker) -> None:
    constant = torch.arange(3.0)
    total = bob.send(torch.ones(3)) + constant
    constant.zero_()
    assert torch.equal(total.get(), torch.tensor([1.0, 2.0, 3.0]))


def test_a_large_local_tensor_has_to_be_sent_on_purpose(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(()))
    fits = limits.MAX_CONSTANT_BYTES // 4
    assert torch.equal((x + torch.ones(fits)).get(), torch.full((fits,), 2.0))
    with pytest.raises(wsfed.ConstantTooLarge, match=r"worker\.send") as caught:
        x + torch.ones(fits + 1)
    assert caught.value.nbytes == 4 * (fits + 1)
    assert caught.value.limit == limits.MAX_CONSTANT_BYTES
    assert caught.value.op == "torch.Tensor.add"


def test_a_local_tensor_that_requires_grad_is_refused(bob: sync.VirtualWorker) -> None:
    x, weight = bob.send(torch.ones(3)), torch.ones(3, requires_grad=True)
    with pytest.raises(wsfed.PointerError, match="its gradient would be lost"):
        x * weight
    with torch.no_grad():
        assert torch.equal((x * weight).get(), torch.ones(3))
    assert torch.equal((x * weight.detach()).get(), torch.ones(3))


@pytest.mark.parametrize(
    "write",
    [
        lambda local, pointer: local.add_(pointer),
        lambda local, pointer: operator.iadd(local, pointer),
        lambda local, pointer: local.copy_(pointer),
        lambda local, pointer: local.__setitem__(0, pointer[0]),
    ],
    ids=["add_", "+=", "copy_", "assignment"],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_pointer_is_not_written_into_a_local_tensor(
    write: Callable[[Any, Any], Any], mode: Callable[[], Any], bob: sync.VirtualWorker
) -> None:
    local = torch.zeros(3)
    with mode(), pytest.raises(wsfed.PointerError, match="write into a local tensor"):
        write(local, bob.send(torch.ones(3)))


def test_a_meta_tensor_is_refused(bob: sync.VirtualWorker) -> None:
    with pytest.raises(wsfed.PointerError, match="meta device"):
        bob.send(torch.ones(3)) + torch.ones(3, device="meta")


# --- errors at the user's line -------------------------------------------------------------------


def here(after: int = 0) -> str:
    """``file:line`` of the caller, or of so many lines after it."""
    import sys

    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno + after}"


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: x + y,
        lambda x, y: x.view(7),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.mm(x, y),
        lambda x, y: y.copy_(x),
        lambda x, y: x.sum(dim=5),
        lambda x, y: x[5],
    ],
    ids=range(7),
)
def test_what_does_not_fit_is_torchs_own_error(
    call: Callable[[Any, Any], Any], bob: sync.VirtualWorker
) -> None:
    a, b = torch.ones(2, 3), torch.ones(4, 5)
    with pytest.raises((RuntimeError, IndexError)) as local:
        call(a, b)
    with pytest.raises(local.type) as remote:
        call(bob.send(a), bob.send(b))
    assert remote.type is local.type
    assert re.search(r"\d", str(remote.value)), "it tells sizes or places"


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: x.view(7),
        lambda x, y: x.sum(dim=5),
        lambda x, y: x[5],
        lambda x, y: x.expand(5, 5),
    ],
    ids=range(4),
)
def test_the_text_of_an_error_is_torchs(
    call: Callable[[Any, Any], Any], bob: sync.VirtualWorker
) -> None:
    a, b = torch.ones(2, 3), torch.ones(4, 5)
    with pytest.raises((RuntimeError, IndexError)) as local:
        call(a, b)
    with pytest.raises(local.type) as remote:
        call(bob.send(a), bob.send(b))
    assert str(remote.value) == str(local.value)


def test_nothing_is_sent_for_a_call_that_cannot_be(bob: sync.VirtualWorker) -> None:
    x, y = bob.send(torch.ones(2, 3)), bob.send(torch.ones(4, 5))
    bob.flush()
    sent = bob.traffic[0]
    for wrong in (
        lambda: x + y,
        lambda: x.view(7),
        lambda: torch.cat([x, y]),
        lambda: nn.Linear(7, 2)(x),
        lambda: x.sum(dim=5),
        lambda: x[5],
    ):
        with pytest.raises((RuntimeError, IndexError)):
            wrong()
    bob.flush()
    assert bob.traffic[0] - sent < 60  # the flush itself


def test_a_wrong_argument_is_torchs_own_error(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, 3))
    with pytest.raises(TypeError):
        x.sum(nonsense=1)
    with pytest.raises(TypeError):
        torch.nn.functional.linear(x)


def test_pointers_on_two_workers_are_not_collocated(
    bob: sync.VirtualWorker, alice: sync.VirtualWorker
) -> None:
    x, y = bob.send(torch.ones(3)), alice.send(torch.ones(3))
    with pytest.raises(wsfed.NotCollocated) as caught:
        x + y
    assert caught.value.workers == ("bob", "alice")
    assert caught.value.op == "torch.Tensor.add"
    assert caught.value.site == here(-3)
    assert "'bob' and 'alice'" in str(caught.value)
    assert torch.equal((x + y.move(bob)).get(), torch.full((3,), 2.0))


async def test_two_sessions_on_one_worker_are_told_apart_from_two_workers() -> None:
    async with (
        wsfed.Node("bob") as node,
        node.listen() as url,
        wsfed.connect(url) as one,
        wsfed.connect(url) as other,
    ):
        x, y = one.send(torch.ones(3)), other.send(torch.ones(3))
        with pytest.raises(wsfed.NotCollocated, match="called 'bob': connect once"):
            x + y
        assert torch.equal(await (x + y.move(one)), torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: x._is_view(), "compile cannot trace"),  # the first thing it asks
        (lambda x: x.data_ptr(), "address"),
        (lambda x: x.untyped_storage(), "address"),
        (lambda x: x.register_hook(print), "runs no code of the client's; take gradients with"),
        (lambda x: x.apply_(abs), "code that the client would have to send"),
        (lambda x: x.new_empty_strided((2,), (1,)), "uninitialised"),
        (lambda x: x.resize_(9), "uninitialised"),
        (lambda x: x.as_strided((2,), (1,)), "uninitialised"),
        (lambda x: x.to_sparse(), "sparse"),
        (lambda x: x.cuda(), "owner chooses the device"),
    ],
    ids=range(10),
)
def test_a_refused_operation_says_why_and_where(
    call: Callable[[Any], Any], why: str, bob: sync.VirtualWorker
) -> None:
    x = bob.send(torch.ones(3))
    with pytest.raises(wsfed.OpNotAllowed, match=why) as caught:
        call(x)
    assert caught.value.op.startswith("torch.")
    assert caught.value.site == f"{__file__}:{call.__code__.co_firstlineno}"
    assert caught.value.site in str(caught.value)


def test_transforms_are_refused_by_name(bob: sync.VirtualWorker) -> None:
    with pytest.raises(wsfed.OpNotAllowed, match="transforms of functions"):
        torch.func.vmap(lambda row: row * 2)(bob.send(torch.ones(3)))


def test_an_unknown_operation_is_refused_at_its_line(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))

    def mine(tensor: torch.Tensor) -> Any:
        return torch.overrides.handle_torch_function(mine, (tensor,), tensor)

    with pytest.raises(wsfed.OpNotAllowed, match="no worker knows this operation"):
        mine(x)


def test_an_output_argument_that_is_local_is_refused(bob: sync.VirtualWorker) -> None:
    with pytest.raises((wsfed.OpNotAllowed, wsfed.PointerError), match="out"):
        torch.add(bob.send(torch.ones(3)), 1, out=torch.ones(3))


def test_a_function_does_not_travel(bob: sync.VirtualWorker) -> None:
    with pytest.raises(TypeError):
        bob.send(torch.ones(3)).new_ones(3).add(bob.send(torch.ones(3)), alpha=print)


def test_a_failure_on_the_worker_tells_everything(bob: sync.VirtualWorker) -> None:
    weight, rows = bob.send(torch.ones(3, 2)), bob.send(torch.tensor([0, 9]))
    where, found = here(), F.embedding(rows, weight)
    doubled = (found * 2).sum()
    for pointer in (found, doubled, doubled + 1):
        with pytest.raises(wsfed.RemoteError, match="index out of range in self") as caught:
            pointer.get()
        error = caught.value
        assert error.type == "IndexError"
        assert error.op == "torch.nn.functional.embedding"
        assert error.shapes == ("int64[2]", "float32[3, 2]")
        assert error.worker == "bob"
        assert error.site == where
        assert where in str(error)


def test_the_line_of_a_failure_inside_a_layer_is_the_users(bob: sync.VirtualWorker) -> None:
    layer = bob.send(nn.Embedding(3, 2))
    rows = bob.send(torch.tensor([9]))
    where, found = here(), layer(rows)
    with pytest.raises(wsfed.RemoteError) as caught:
        found.get()
    assert caught.value.site == where


def test_the_worker_goes_on_after_a_failure(bob: sync.VirtualWorker) -> None:
    weight = bob.send(torch.ones(3, 2))
    lost = F.embedding(bob.send(torch.tensor([9])), weight)
    assert torch.equal((weight + 1).get(), torch.full((3, 2), 2.0))
    with pytest.raises(wsfed.RemoteError):
        lost.get()
    bob.flush()


def test_flush_tells_of_a_failure_nobody_awaits(bob: sync.VirtualWorker) -> None:
    weight = bob.send(torch.ones(3, 2))
    F.embedding(bob.send(torch.tensor([9])), weight)
    with pytest.raises(wsfed.RemoteError, match="index out of range"):
        bob.flush()
    bob.flush()


# --- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_made_without_grad_requires_none(
    mode: Callable[[], Any], bob: sync.VirtualWorker
) -> None:
    x = bob.send(torch.ones(3, requires_grad=True))
    with mode():
        y = x * 2
    assert not y.requires_grad
    assert y.is_leaf
    z = x * 2
    assert z.requires_grad
    assert torch.equal(y.get(), torch.full((3,), 2.0))
    assert not y.get().requires_grad


def test_grad_can_be_enabled_within_no_grad(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3, requires_grad=True))
    with torch.no_grad(), torch.enable_grad():
        y = (x * 2).sum()
    y.backward()
    assert torch.equal(x.grad.get(), torch.full((3,), 2.0))


def test_a_tensor_of_inference_mode_is_not_for_training(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3, requires_grad=True))
    with torch.inference_mode():
        y = x * 2
    product = x * y
    with pytest.raises(wsfed.RemoteError, match="Inference tensors cannot be saved"):
        product.get()


#: Numbers that are equal, and that torch promotes each in its own way.
EQUALS: list[Any] = [1, 1.0, True, 1 + 0j, np.float64(1.0), np.float32(1.0), np.int64(1)]


@pytest.mark.parametrize("first", EQUALS, ids=lambda value: type(value).__name__)
def test_equal_numbers_of_other_types_are_other_calls(first: Any, bob: sync.VirtualWorker) -> None:
    local = torch.tensor([1, 2, 3])
    remote = bob.send(local)
    for value in (first, *EQUALS, first):
        assert_same_bits(remote * value, local * value)


def test_a_fraction_of_numpys_is_told_apart_where_the_shape_depends_on_it(
    bob: sync.VirtualWorker,
) -> None:
    local = torch.ones(1, 1, 4, 4)
    remote = bob.send(local)
    for scale in (np.float64(2.0), np.float64(1.5)):
        assert_same_bits(
            F.interpolate(remote, scale_factor=scale), F.interpolate(local, scale_factor=scale)
        )


def test_a_schedule_of_numpys_fractions_is_inferred_once(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    (x * np.float64(0.5)).get()
    known = len(calls._cache._known)
    for step in range(10):
        x * np.float64(step)
    assert len(calls._cache._known) == known


def test_a_text_is_not_taken_for_a_keyword(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, 3))
    assert x.sum(dim=1).shape == (2,)
    with pytest.raises(TypeError):
        x.sum("dim", 1)


def test_an_array_of_numpys_says_what_to_write(bob: sync.VirtualWorker) -> None:
    with pytest.raises(TypeError, match="from_numpy"):
        bob.send(torch.ones(3))[np.array([0, 2])]


def test_a_constant_that_is_too_large_frees_those_before_it(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(3))
    (hosted,) = bob._node._sessions.values()
    bob.flush()
    before = len(hosted.interpreter.store)
    with pytest.raises(wsfed.ConstantTooLarge):
        torch.cat([x, torch.ones(3), torch.ones(20_000)])
    bob.flush()
    bob.flush()
    assert len(hosted.interpreter.store) == before
