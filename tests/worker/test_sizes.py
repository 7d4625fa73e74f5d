"""A result that would not fit is refused before it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import wsfed
from wsfed.ops.table import OPS, Op, lookup
from wsfed.worker import sizes
from wsfed.worker.sizes import ResultSizes

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "size"),
    [
        ("torch.Tensor.expand", (torch.ones(1), GIB), {}, 0),  # a view takes no memory
        ("torch.Tensor.repeat", (torch.ones(1024), 1024, 1024), {}, 4 * GIB),
        ("torch.outer", (torch.ones(2**15), torch.ones(2**15)), {}, 4 * GIB),
        ("torch.Tensor.add", (torch.ones(2**15, 1), torch.ones(1, 2**15)), {}, 4 * GIB),
        ("torch.nn.functional.interpolate", (torch.ones(1, 1, 64, 64),), {"size": 2**15}, 4 * GIB),
        ("torch.nn.functional.pad", (torch.ones(1), [0, GIB - 1]), {}, 4 * GIB),
        ("torch.matmul", (torch.ones(2**15, 1), torch.ones(1, 2**15)), {}, 4 * GIB),
        ("torch.matmul", (torch.ones(64, 784), torch.ones(784, 256)), {}, 64 * 256 * 4),
        ("torch.Tensor.add_", (torch.ones(2**12, 2**12), 1), {}, 0),
        ("torch.Tensor.add", (torch.ones(10), 1), {}, 0),
        ("torch.matmul", (torch.ones(2**12, 2**12), torch.ones(3)), {}, 0),
    ],
)
def test_the_size_of_a_result_is_known_before(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], size: int
) -> None:
    known = ResultSizes()
    for _ in range(2):
        assert known.of(OPS[name], args, kwargs) == size


async def test_a_few_bytes_cannot_ask_for_gigabytes() -> None:
    async with wsfed.VirtualWorker("bob", max_memory=2**20) as bob:
        one = bob.send(torch.ones(1, 1))
        for large in (
            one.expand(2**20, 2**20),
            one.repeat(2**15, 2**15),
            bob.send(torch.ones(2**14, 1)) + bob.send(torch.ones(1, 2**14)),
        ):
            with pytest.raises(wsfed.QuotaExceeded, match="of this session"):
                await large.get()
        assert (await (one + 1).get()).item() == 2


@pytest.mark.parametrize(
    ("name", "args", "nbytes"),
    [
        ("torch.repeat_interleave", (torch.ones(2, 3), torch.tensor([4, 5]), 0), 9 * 3 * 4),
        ("torch.repeat_interleave", (torch.tensor([4, 5]),), 9 * 8),
        ("torch.Tensor.repeat_interleave", (torch.ones(2), torch.tensor([4, 5])), 9 * 4),
        ("torch.bincount", (torch.tensor([1, 9]),), 10 * 8),
        ("torch.nn.functional.one_hot", (torch.tensor([1, 9]),), 2 * 10 * 8),
    ],
)
def test_values_that_tell_a_size_are_asked(name: str, args: tuple[Any, ...], nbytes: int) -> None:
    assert ResultSizes().of(lookup(name), args, {}) == nbytes
    assert lookup(name).call(*args).nbytes == nbytes


#: Calls of functions whose sizes are told by shapes, as torch's modules make them.
_CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(784, 1000), (512, 784)),
    "conv1d": (lambda: nn.Conv1d(8, 600, 5, stride=2, padding=3), (64, 8, 500)),
    "conv2d": (
        lambda: nn.Conv2d(4, 100, (3, 2), dilation=2, groups=2, bias=False),
        (32, 4, 60, 50),
    ),
    "conv2d, same": (lambda: nn.Conv2d(4, 100, 5, padding="same"), (32, 4, 60, 50)),
    "conv2d, one": (lambda: nn.Conv2d(4, 100, 5, padding="valid"), (4, 300, 250)),
    "conv3d": (lambda: nn.Conv3d(2, 30, 3, padding=(1, 0, 2)), (8, 2, 20, 30, 20)),
    "batch_norm": (lambda: nn.BatchNorm2d(40), (32, 40, 60, 50)),
    "group_norm": (lambda: nn.GroupNorm(2, 40), (32, 40, 60, 50)),
    "instance_norm": (lambda: nn.InstanceNorm2d(40), (32, 40, 60, 50)),
    "layer_norm": (lambda: nn.LayerNorm(50), (32, 40, 60, 50)),
    "rms_norm": (lambda: nn.RMSNorm(50), (32, 40, 60, 50)),
    "lstm": (lambda: nn.LSTM(64, 96, 2, bidirectional=True), (200, 32, 64)),
    "gru": (lambda: nn.GRU(64, 96, batch_first=True), (64, 200, 64)),
    "rnn": (lambda: nn.RNN(64, 96), (200, 64, 64)),
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that shapes have told; nothing else may be asked."""
    made: list[int] = []
    known = ResultSizes.of

    def of(self: ResultSizes, op: Op, *given: Any) -> int:
        size = known(self, op, *given)
        if op.name in sizes._BY_SHAPES:
            made.append(size)
        return size

    monkeypatch.setattr(sizes, "_infer", lambda *_: pytest.fail("it was asked"))
    monkeypatch.setattr(ResultSizes, "of", of)
    return made


@pytest.mark.parametrize("name", _CALLS)
async def test_what_shapes_tell_is_what_is_made(name: str, told: list[int]) -> None:
    make, shape = _CALLS[name]
    async with wsfed.VirtualWorker("bob") as bob:
        with torch.no_grad():
            made = bob.send(make())(bob.send(torch.randn(shape)))
        await bob.flush()
    leaves = [each for each in pytree.tree_leaves(made) if isinstance(each, wsfed.Pointer)]
    assert told == [sum(each.numel() * each.element_size() for each in leaves)]


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("float64", "float32"), ("int64", "bool")]
)
async def test_arithmetic_is_told_by_its_operands(dtypes: tuple[str, str], told: list[int]) -> None:
    async with wsfed.VirtualWorker("bob") as bob:
        x, y = (
            bob.send(torch.ones(shape).to(getattr(torch, dtype)))
            for shape, dtype in zip(((300, 1, 40), (200, 1)), dtypes, strict=True)
        )
        made = [x + y, y * x]
        if "bool" not in dtypes:
            made.append(torch.sub(x, y, alpha=2))
        await bob.flush()
    assert told == [each.numel() * each.element_size() for each in made]


@pytest.mark.parametrize(("more", "heads"), [({}, 4), ({"average_attn_weights": False}, 1)])
async def test_attention_is_told_with_its_weights(
    more: dict[str, bool], heads: int, told: list[int]
) -> None:
    async with wsfed.VirtualWorker("bob") as bob:
        x = bob.send(torch.randn(100, 32, 64))
        with torch.no_grad():
            output, weights = bob.send(nn.MultiheadAttention(64, 4))(x, x, x, **more)
        await bob.flush()
    assert told == [4 * (output.numel() + weights.numel() * heads)]


def test_an_ordinary_step_needs_no_meta_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's meta kernels of these load its compiler, which takes seconds, at the first one."""
    monkeypatch.setattr("wsfed.worker.sizes._infer", lambda *_: pytest.fail("it was asked"))
    known = ResultSizes()
    rows, weight, labels = torch.randn(512, 784), torch.randn(1000, 784), torch.zeros(512).long()
    linear, loss = OPS["torch.nn.functional.linear"], OPS["torch.nn.functional.cross_entropy"]
    assert known.of(linear, (rows, weight, torch.zeros(1000)), {}) == 512 * 1000 * 4
    options = {"weight": None, "ignore_index": -100, "reduction": "none", "label_smoothing": 0.0}
    assert known.of(loss, (torch.randn(512, 1000), labels), options) == 0
