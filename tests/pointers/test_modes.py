"""Autocast through pointers: the dtypes and bits of torch, for as long as its block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.pointers.oracle import assert_same_bits
from wsfed import sync
from wsfed.testing import worker_process


@pytest.fixture(scope="module")
def worker() -> Iterator[sync.Worker]:
    """A process of its own: the casts that torch remembers belong to a process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            worker_process("--threads", "1") as started,
            sync.connect(started["url"]) as connected,
        ):
            yield connected
    finally:
        torch.set_num_threads(threads)


def convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (convolutional, (2, 1, 8, 8)),
    "recurrent": (lambda: nn.LSTM(3, 4, batch_first=True), (2, 5, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("convolutional", torch.bfloat16),
        ("convolutional", torch.float16),
        ("recurrent", torch.bfloat16),
        ("attention", torch.bfloat16),
        ("attention", torch.float16),
    ],
    ids=str,
)
def test_a_training_step_in_autocast(name: str, dtype: torch.dtype, worker: sync.Worker) -> None:
    try:
        expected = trained_in_autocast(name, dtype, lambda value: value)
    except RuntimeError as error:  # a CPU for which oneDNN has no such kernel
        reason = str(error)
        with pytest.raises(wsfed.RemoteError) as caught:
            wsfed.sync.get(trained_in_autocast(name, dtype, worker.send))
        assert caught.value.message == reason
        return
    got = trained_in_autocast(name, dtype, worker.send)
    for local, remote in zip(expected, got, strict=True):
        assert_same_bits(remote.detach(), local)


def trained_in_autocast(
    name: str, dtype: torch.dtype, send: Callable[[Any], Any]
) -> list[torch.Tensor]:
    """Output and gradients of one step."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = send(make().eval()), torch.randn(shape)
    x = send(x)
    with torch.autocast("cpu", dtype=dtype):
        output = model(x)
        output = output[0] if isinstance(output, tuple) else output
    assert output.dtype == dtype or name == "attention"
    output.float().square().sum().backward()
    return [output, *(p.grad for p in model.parameters())]


def test_a_weight_that_is_used_twice_is_cast_once(worker: sync.Worker) -> None:
    gradients = []
    for there in (False, True):
        torch.manual_seed(0)
        layer, x = nn.Linear(3, 3), torch.randn(2, 3)
        if there:
            worker.send(layer)
            x = worker.send(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(layer(layer(x)))
        output.float().sum().backward()
        gradients.append(layer.weight.grad)
    assert_same_bits(gradients[1], gradients[0])


def test_autocast_ends_with_its_block(bob: sync.VirtualWorker) -> None:
    x = bob.send(torch.ones(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = x @ x
        with torch.autocast("cpu", enabled=False):
            assert (x @ x).get().dtype == torch.float32
    outside = x @ x
    assert (inside.dtype, inside.get().dtype) == (torch.bfloat16, torch.bfloat16)
    assert (outside.dtype, outside.get().dtype) == (torch.float32, torch.float32)


def test_autocast_of_a_loss_and_of_several_arguments(bob: sync.VirtualWorker) -> None:
    x, y = torch.randn(3, 4), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.mse_loss(torch.cat([x @ y, x[:, :3]]), torch.zeros(6, 3))
        got = F.mse_loss(
            torch.cat([bob.send(x) @ bob.send(y), bob.send(x)[:, :3]]), torch.zeros(6, 3)
        )
    assert_same_bits(got, expected)


async def test_autocast_is_known_here(carol: wsfed.VirtualWorker) -> None:
    x: Any = carol.send(torch.ones(2, 2))
    with torch.autocast("cpu", dtype=torch.float16):
        product = x @ x
    assert product.dtype == torch.float16
    assert (await product).dtype == torch.float16
