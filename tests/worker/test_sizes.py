"""A result that would not fit is refused before it is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wsfed
from wsfed.ops.table import OPS, lookup
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
    sizes = ResultSizes()
    for _ in range(2):
        assert sizes.of(OPS[name], args, kwargs) == size


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


def test_an_ordinary_step_needs_no_meta_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's meta kernels of these load its compiler, which takes seconds, at the first one."""
    monkeypatch.setattr("wsfed.worker.sizes._infer", lambda *_: pytest.fail("it was asked"))
    known = ResultSizes()
    rows, weight, labels = torch.randn(512, 784), torch.randn(1000, 784), torch.zeros(512).long()
    linear, loss = OPS["torch.nn.functional.linear"], OPS["torch.nn.functional.cross_entropy"]
    assert known.of(linear, (rows, weight, torch.zeros(1000)), {}) == 512 * 1000 * 4
    options = {"weight": None, "ignore_index": -100, "reduction": "none", "label_smoothing": 0.0}
    assert known.of(loss, (torch.randn(512, 1000), labels), options) == 0
