"""Every tensor that has a wire form comes back bit for bit, and what has none is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsfed.errors import PointerError
from wsfed.protocol.codec import ITEM_SIZES
from wsfed.protocol.stream import Incoming
from wsfed.tensors import DTYPES, allocate, describe, incoming, outgoing


def back(tensor: torch.Tensor, *, streamed: bool = False) -> torch.Tensor:
    sent = outgoing(tensor)
    data = memoryview(bytes(sent.data))
    if streamed:
        memory = allocate(len(data))
        assert memory is not None
        memory[:] = data
        data = memory
    made = incoming(Incoming(sent.dtype, sent.shape, len(data), data))
    assert made is not None
    return made


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(outgoing(tensor).data)


@pytest.mark.parametrize("streamed", [False, True], ids=["inline", "streamed"])
@pytest.mark.parametrize("name", ITEM_SIZES)
@given(shape=st.lists(st.integers(0, 3), max_size=3), seed=st.integers(0, 1000))
def test_any_bits_come_back(name: str, streamed: bool, shape: list[int], seed: int) -> None:
    dtype = DTYPES[name]
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed))
    if dtype is torch.bool:
        raw = raw % 2
    parts = {
        torch.complex32: torch.float16,
        torch.complex64: torch.float32,
        torch.complex128: torch.float64,
    }
    tensor = raw.to(torch.uint8)
    if dtype in parts:
        tensor = torch.view_as_complex(tensor.view(parts[dtype]).view(*shape, 2))
    else:
        tensor = tensor.view(dtype).view(shape)
    result = back(tensor, streamed=streamed)
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    assert bits(result) == bits(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3).t(),
        torch.arange(10)[::3],
        torch.zeros(1).expand(5),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(3, requires_grad=True) * 2,
    ],
    ids=["transposed", "stepped", "expanded", "conjugate", "negative", "channels last", "graph"],
)
def test_what_goes_out_is_the_logical_view(tensor: torch.Tensor) -> None:
    assert torch.equal(back(tensor), tensor.detach())
    assert len(outgoing(tensor).data) == tensor.numel() * tensor.element_size()


def test_memory_is_aligned_as_torch_aligns() -> None:
    for size in (1, 100, 10_000):
        assert back(torch.ones(size)).data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.eye(3).to_sparse(), "a sparse_coo tensor has no wire form"),
        (lambda: torch.ones(2, device="meta"), "has no values to send"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "a quantised tensor has no wire form",
        ),
    ],
    ids=["sparse", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*deprecated")
def test_what_has_no_wire_form_is_refused(make: Callable[[], torch.Tensor], said: str) -> None:
    with pytest.raises(PointerError, match=said):
        outgoing(make())


def test_a_description_shows_no_value() -> None:
    assert describe(torch.full((2, 3), 7.5)) == "float32[2, 3]"
