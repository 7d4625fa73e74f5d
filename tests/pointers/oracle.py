"""The oracle of these tests: the same lines in plain torch, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from wsfed import Pointer, sync


def assert_same_bits(remote: torch.Tensor, local: torch.Tensor) -> None:
    """Dtype, shape and every bit are equal; a pointer's metadata tell the truth."""
    local = local.detach()
    if isinstance(remote, Pointer):
        assert remote.shape == local.shape
        assert remote.dtype == local.dtype
        assert remote.stride() == local.stride()
        remote = remote.get()
    assert type(remote) in (torch.Tensor, nn.Parameter)
    assert (remote.dtype, remote.shape) == (local.dtype, local.shape)
    assert bits(remote) == bits(local), f"{remote} is not {local}"


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(remote: Any, local: Any) -> None:
    """Both have the same structure, and the same bits at its leaves."""
    remote_leaves, remote_spec = pytree.tree_flatten(remote)
    local_leaves, local_spec = pytree.tree_flatten(local)
    assert remote_spec == local_spec
    for one, other in zip(remote_leaves, local_leaves, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.requires_grad == other.requires_grad
            assert_same_bits(one, other)
        else:
            assert one == other


def assert_same_grad(remote: torch.Tensor, local: torch.Tensor) -> None:
    if local.grad is None:
        assert remote.grad is None
    else:
        assert remote.grad is not None
        assert_same_bits(remote.grad, local.grad)


def scalar(value: Any) -> torch.Tensor | None:
    """Something to go backward from: the sum of the squares of what requires grad."""
    terms = [
        (leaf * leaf).sum()
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    return sum(terms[1:], terms[0]) if terms else None


def check(worker: Any, function: Callable[..., Any], *args: Any) -> None:
    """``function`` gives the same on pointers: results, gradients, and what it writes.

    Tensors among the arguments are sent; the floating ones require grad.
    """
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    local = [each.detach().clone().requires_grad_(each.requires_grad) for each in tensors]
    remote = [worker.send(each) for each in local]
    fill_local, fill_remote = iter(local), iter(remote)
    ours = [next(fill_local) if isinstance(arg, torch.Tensor) else arg for arg in args]
    theirs = [next(fill_remote) if isinstance(arg, torch.Tensor) else arg for arg in args]
    expected, got = function(*ours), function(*theirs)
    assert_same(got, expected)
    end, remote_end = scalar(expected), scalar(got)
    if end is not None:
        assert remote_end is not None
        end.backward()
        remote_end.backward()
    for one, other in zip(remote, local, strict=True):
        assert_same_bits(one, other)
        if other.is_leaf:
            assert_same_grad(one, other)


def check_module(
    worker: Any,
    module: nn.Module,
    *inputs: torch.Tensor,
    call: Callable[..., Any] | None = None,
    steps: int = 2,
) -> None:
    """A module does the same on a worker: results, gradients, buffers, and after coming home."""
    local, remote = copy.deepcopy(module), module
    worker.send(remote)
    call = call or (lambda module, *tensors: module(*tensors))
    for step in range(steps):
        torch.manual_seed(step)
        worker.manual_seed(step)
        ours = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
        theirs = [worker.send(each) for each in ours]
        expected, got = call(local, *ours), call(remote, *theirs)
        assert_same(got, expected)
        end, remote_end = scalar(expected), scalar(got)
        if end is not None:
            assert remote_end is not None
            end.backward()
            remote_end.backward()
        for one, other in zip(theirs, ours, strict=True):
            assert_same_grad(one, other)
        assert_same_state(remote, local)
    if any(True for _ in (*remote.parameters(), *remote.buffers())):
        sync.get(remote)
    assert_same_state(remote, local)
    torch.manual_seed(9)
    again = call(remote, *inputs)
    torch.manual_seed(9)
    assert_same(again, call(local, *inputs))


def assert_same_state(remote: nn.Module, local: nn.Module) -> None:
    """Parameters, their gradients and their flags, and buffers are the same."""
    for (name, one), (expected, other) in zip(
        remote.named_parameters(), local.named_parameters(), strict=True
    ):
        assert name == expected
        assert isinstance(one, nn.Parameter)
        assert one.requires_grad == other.requires_grad
        assert_same_bits(one, other)
        assert_same_grad(one, other)
    for (name, one), (expected, other) in zip(
        remote.named_buffers(), local.named_buffers(), strict=True
    ):
        assert name == expected
        assert not isinstance(one, nn.Parameter)
        assert_same_bits(one, other)
