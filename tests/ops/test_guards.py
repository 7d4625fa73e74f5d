"""Hostile calls to kernels that believe their arguments, and honest ones beside them.

Without the guards the hostile ones end the process, or give back memory that is not theirs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import rnn

from wsfed.errors import OpNotAllowed
from wsfed.ops.table import OPS, lookup, wire_name


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def whole(*items: Any) -> Tensor:
    return torch.tensor(items)


LOGITS = torch.zeros(5, 1, 4)
LSTM = ([ones(1, 1, 2), ones(1, 1, 2)], [ones(8, 3), ones(8, 2), ones(8), ones(8)])
SETTINGS = (True, 1, 0.0, False, False, False)

HOSTILE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "attention over values that are not there": (
        "nn.functional.scaled_dot_product_attention",
        (ones(1, 1, 2, 4), ones(1, 1, 300, 4), ones(1, 1, 3, 4)),
    ),
    "a target beyond the classes": (
        "nn.functional.ctc_loss",
        (LOGITS, whole([1, 10**8]), whole(5), whole(2)),
    ),
    "a negative target": ("ctc_loss", (LOGITS, whole(-1000, 1), whole(5), whole(2))),
    "a target beyond, lengths as a list": ("ctc_loss", (LOGITS, whole([1, 9]), [5], [2])),
    "offsets that fall": (
        "nn.functional.embedding_bag",
        (whole(0, 1, 2), ones(3, 2), whole(0, 3, 1)),
    ),
    "raw offsets that fall": ("embedding_bag", (ones(3, 2), whole(0, 1, 2), whole(0, 3, 1))),
    "a mode that is none": (
        "grid_sampler_2d",
        (ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), 77, 0, False),
    ),
    "a padding that is none": (
        "grid_sampler",
        (ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), 0, 88, False),
    ),
    "bicubic in three dimensions": (
        "grid_sampler_3d",
        (ones(1, 1, 2, 2, 2), torch.zeros(1, 1, 1, 1, 3), 2, 0, False),
    ),
    "a mode in a tensor": (
        "grid_sampler_2d",
        (ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), torch.tensor(77), 0, False),
    ),
    "a norm too short": ("_weight_norm", (ones(300, 2), ones(1, 1), 0)),
    "a norm in a dimension that is none": ("_weight_norm", (ones(3, 2), ones(3, 1), 5)),
    "weights too small": ("lstm", (ones(3, 1, 64), *LSTM, *SETTINGS)),
    "biases too small": (
        "lstm",
        (ones(3, 1, 3), LSTM[0], [*LSTM[1][:2], ones(1), ones(1)], *SETTINGS),
    ),
    "states of another batch": ("lstm", (ones(3, 5, 3), *LSTM, *SETTINGS)),
    "too few weights": ("lstm", (ones(3, 1, 3), LSTM[0], LSTM[1][:2], *SETTINGS)),
    "too many layers": ("lstm", (ones(3, 1, 3), *LSTM, True, 2, 0.0, False, False, False)),
    "a sequence longer than the batch": (
        "_pack_padded_sequence",
        (ones(3, 2, 1), whole(300_000, 1), False),
    ),
    "a negative batch size": (
        "_pad_packed_sequence",
        (ones(3, 2), whole(2, -10), False, 0.0, 3),
    ),
    "batch sizes beyond the data": (
        "_pad_packed_sequence",
        (ones(3, 2), whole(2, 2), False, 0.0, 3),
    ),
    "a power without an opposite": ("linalg.matrix_power", (torch.eye(2), -(2**63))),
    "a device of the client's choice": ("Tensor.to", (ones(1), "cuda:0")),
    "a device that holds nothing": ("Tensor.to", (ones(1), "meta")),
    "a type on another device": ("Tensor.type", (ones(1), "torch.cuda.FloatTensor")),
    "a sparse type": ("Tensor.type", (ones(1), "torch.sparse.FloatTensor")),
    "out by its place, in normalize": (
        "nn.functional.normalize",
        (ones(2, 2), 2.0, 1, 1e-12, torch.zeros(2, 2)),
    ),
    "out by its place, in tensordot": (
        "functional.tensordot",
        (ones(2, 2), ones(2, 2), 1, torch.zeros(2, 2)),
    ),
    "out by its place, in lu": (
        "functional.lu",
        (ones(2, 2), True, False, (torch.zeros(2, 2), torch.zeros(2))),
    ),
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_a_hostile_call_is_refused_before_the_kernel_runs(case: str) -> None:
    name, args = HOSTILE[case]
    with pytest.raises(OpNotAllowed) as caught:
        lookup(f"torch.{name}").call(*args)
    assert caught.value.op == f"torch.{name}"


def test_values_are_not_in_the_refusal() -> None:
    with pytest.raises(OpNotAllowed) as caught:
        lookup("torch.ctc_loss").call(LOGITS, whole([1, 987_654]), [5], [2])
    assert "987" not in str(caught.value)


def test_static_keys_are_refused_by_keyword_and_by_place() -> None:
    call = lookup("torch.nn.functional.multi_head_attention_forward").call
    with pytest.raises(OpNotAllowed, match="static_k"):
        call(ones(1, 1, 4), static_k=ones(1, 3, 4))
    with pytest.raises(OpNotAllowed, match="static_k"):
        call(*[None] * 21, ones(1, 3, 4))


def test_the_weights_of_an_lstm_are_given_by_place() -> None:
    with pytest.raises(OpNotAllowed):
        lookup("torch.lstm").call(input=ones(3, 1, 64), hx=LSTM[0], params=LSTM[1])


# --- honest calls --------------------------------------------------------------------------------


class Guarded(torch.Tensor):
    """Runs what torch intercepts through the table, as a worker does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = wire_name(func)
        with torch._C.DisableTorchFunctionSubclass():
            return (func if name is None else OPS[name].call)(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"batch_first": True, "num_layers": 2},
        {"bias": False},
        {"proj_size": 2, "num_layers": 2, "bidirectional": True},
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_every_kind_of_lstm_passes(settings: dict[str, Any]) -> None:
    layer, data = nn.LSTM(3, 4, **settings), torch.rand(5, 2, 3)
    guarded, (hidden, _) = layer(data.as_subclass(Guarded))
    plain, (expected, _) = layer(data)
    assert torch.equal(guarded, plain)
    assert torch.equal(hidden, expected)


def test_a_packed_sequence_passes() -> None:
    layer, data = nn.LSTM(3, 4), torch.rand(5, 2, 3)

    def run(data: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(data, torch.tensor([5, 2]))
        return rnn.pad_packed_sequence(layer(packed)[0])[0]

    assert torch.equal(run(data.as_subclass(Guarded)), run(data))


def test_padding_of_targets_may_be_anything() -> None:
    args = (LOGITS.log_softmax(2), whole([1, 2, -1]), [5], [2])
    assert torch.equal(lookup("torch.ctc_loss").call(*args), torch.ctc_loss(*args))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm_passes(dim: int) -> None:
    v = torch.rand(3, 2)
    g = torch.norm_except_dim(v, 2, dim)
    assert torch.equal(lookup("torch._weight_norm").call(v, g, dim), torch._weight_norm(v, g, dim))


def test_a_matrix_is_raised_by_place_and_by_keyword() -> None:
    call, matrix = lookup("torch.linalg.matrix_power").call, torch.eye(2) * 2
    assert torch.equal(call(matrix, 3), torch.eye(2) * 8)
    assert torch.equal(call(input=matrix, n=-1), torch.eye(2) / 2)


def test_other_honest_calls_pass() -> None:
    q, k, v = torch.rand(2, 3, 4), torch.rand(2, 5, 4), torch.rand(2, 5, 6)
    name = "torch.nn.functional.scaled_dot_product_attention"
    assert torch.equal(lookup(name).call(q, k, v), functional.scaled_dot_product_attention(q, k, v))
    bag = (whole(0, 1, 2), torch.rand(3, 2), whole(0, 1, 1))
    expected = functional.embedding_bag(*bag)
    assert torch.equal(lookup("torch.nn.functional.embedding_bag").call(*bag), expected)
    image, grid = torch.rand(1, 1, 2, 2), torch.rand(1, 2, 2, 2)
    made = lookup("torch.grid_sampler_2d").call(image, grid, 0, 1, False)
    assert torch.equal(made, torch.grid_sampler_2d(image, grid, 0, 1, False))
    assert lookup("torch.Tensor.to").call(image, "cpu") is image
    assert lookup("torch.Tensor.type").call(image, "torch.DoubleTensor").dtype is torch.float64
    made = lookup("torch.nn.functional.normalize").call(image, 2.0, 1, 1e-12, None)
    assert torch.equal(made, functional.normalize(image))
