"""torch's own layers run on a worker as they run here: results, gradients and buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn

import wsfed
from tests.pointers.oracle import check, check_module
from wsfed import sync


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "Linear without bias": (lambda: nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "Flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (2, 3, 4)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 2, 7)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 8)),
    "Conv2d circular": (
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        (1, 2, 5, 5),
    ),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 2, 3), (2, 3, 4, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "BatchNorm with cumulative average": (lambda: nn.BatchNorm1d(4, momentum=None), (6, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 5, 5)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (3, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 5)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (3, 6)),
    "Dropout": (lambda: nn.Dropout(0.4), (8, 8)),
    "Dropout2d": (lambda: nn.Dropout2d(0.4), (4, 3, 5, 5)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.3), (8, 8)),
    "RReLU": (lambda: nn.RReLU(), (8, 8)),
    "RNN": (lambda: nn.RNN(4, 3, batch_first=True), (2, 5, 4)),
    "LSTM": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True), (2, 5, 4)),
    "LSTM with dropout": (lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.5), (5, 2, 4)),
    "LSTM with projection": (lambda: nn.LSTM(4, 3, proj_size=2), (5, 2, 4)),
    "GRU": (lambda: nn.GRU(4, 3, num_layers=2), (5, 2, 4)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 3), (2, 4)),
    "GRUCell": (lambda: nn.GRUCell(4, 3), (2, 4)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (2, 3, 6, 6)),
    "MaxPool2d with indices": (lambda: nn.MaxPool2d(2, return_indices=True), (2, 3, 6, 6)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(3), (2, 3, 7, 7)),
    "PReLU": (lambda: nn.PReLU(3), (4, 3)),
    "GELU": (lambda: nn.GELU(), (4, 3)),
    "Softmax": (lambda: nn.Softmax(dim=-1), (4, 3)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 4, 4)),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (2, 5, 8),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2
        ),
        (2, 5, 8),
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_same_on_a_worker(
    name: str, training: bool, bob: sync.VirtualWorker
) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    check_module(bob, make().train(training), leaf(*shape))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_goes_from_train_to_eval(training: bool, bob: sync.VirtualWorker) -> None:
    norm = nn.BatchNorm1d(4)

    def both(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = module.train(training)(x)
        return first, module.train(not training)(x)

    check_module(bob, norm, leaf(6, 4), call=both)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 1}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}],
    ids=str,
)
def test_an_embedding_is_the_same_on_a_worker(
    options: dict[str, Any], bob: sync.VirtualWorker
) -> None:
    torch.manual_seed(1)
    check_module(bob, nn.Embedding(7, 3, **options), torch.tensor([[1, 4, 4], [0, 6, 2]]))


def test_an_embedding_bag_is_the_same_on_a_worker(bob: sync.VirtualWorker) -> None:
    check_module(bob, nn.EmbeddingBag(7, 3), torch.tensor([[1, 4, 4], [0, 6, 2]]))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_the_same_on_a_worker(
    training: bool, need_weights: bool, bob: sync.VirtualWorker
) -> None:
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True).train(training)
    check_module(
        bob,
        attention,
        leaf(2, 5, 8),
        call=lambda module, x: module(x, x, x, need_weights=need_weights),
    )


def test_attention_takes_a_local_mask(bob: sync.VirtualWorker) -> None:
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    check_module(
        bob,
        nn.MultiheadAttention(8, 2, batch_first=True),
        leaf(2, 5, 8),
        call=lambda module, x: module(x, x, x, attn_mask=mask),
    )


def test_a_recurrent_layer_takes_and_gives_hidden_states(bob: sync.VirtualWorker) -> None:
    torch.manual_seed(1)
    check_module(
        bob,
        nn.LSTM(4, 3),
        leaf(5, 2, 4),
        leaf(1, 2, 3, seed=1),
        leaf(1, 2, 3, seed=2),
        call=lambda module, x, h, c: module(x, (h, c)),
    )


def test_a_recurrent_layer_takes_a_local_hidden_state(bob: sync.VirtualWorker) -> None:
    hidden = torch.ones(1, 2, 3)
    check_module(bob, nn.GRU(4, 3), leaf(5, 2, 4), call=lambda module, x: module(x, hidden))


def test_dropout_draws_what_torch_draws_from_the_same_seed(bob: sync.VirtualWorker) -> None:
    x = torch.ones(64)
    torch.manual_seed(7)
    expected = F.dropout(x, 0.5)
    bob.manual_seed(7)
    assert torch.equal(F.dropout(bob.send(x), 0.5).get(), expected)


def test_drawing_on_a_worker_leaves_local_random_numbers_alone(bob: sync.VirtualWorker) -> None:
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    F.dropout(bob.send(torch.ones(64)), 0.5).get()
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_the_same_on_a_worker(reduction: str, bob: sync.VirtualWorker) -> None:
    target = torch.tensor([0, 2, 1, 2])
    check(bob, lambda x, y: F.cross_entropy(x, y, reduction=reduction), leaf(4, 3), target)


def test_cross_entropy_takes_local_labels_and_weights(bob: sync.VirtualWorker) -> None:
    target, weight = torch.tensor([0, 2, 1, -100]), torch.tensor([1.0, 2.0, 0.5])
    check(
        bob,
        lambda x: F.cross_entropy(x, target, weight=weight, label_smoothing=0.1),
        leaf(4, 3),
    )


@pytest.mark.parametrize(
    "loss",
    [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_a_loss_is_the_same_on_a_worker(loss: nn.Module, bob: sync.VirtualWorker) -> None:
    check(bob, loss, leaf(4, 3), torch.rand(4, 3))


def test_a_convolutional_network_trains_the_same(bob: sync.VirtualWorker) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(36, 5),
        nn.LogSoftmax(dim=1),
    )
    check_module(bob, network, leaf(3, 1, 8, 8), steps=3)


def recurrent(module: nn.Module, lengths: Any, ordered: bool) -> Callable[..., Any]:
    def call(module: nn.Module, padded: torch.Tensor) -> Any:
        packed = rnn.pack_padded_sequence(padded, lengths, enforce_sorted=ordered)
        output, state = module(packed)
        return rnn.pad_packed_sequence(output), state

    return call


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    ("lengths", "ordered"),
    [([5, 3, 2], True), (torch.tensor([2, 5, 3]), False)],
    ids=["sorted", "unsorted"],
)
def test_packed_sequences(kind: Any, lengths: Any, ordered: bool, bob: sync.VirtualWorker) -> None:
    module = kind(4, 6, 2, bidirectional=True)
    check_module(bob, module, leaf(5, 3, 4), call=recurrent(module, lengths, ordered))


def test_sequences_are_packed_and_padded(bob: sync.VirtualWorker) -> None:
    sequences = [leaf(n, 2, seed=n) for n in (5, 3, 1)]
    check(bob, lambda *each: rnn.pack_sequence(list(each)).data, *sequences)
    check(bob, lambda *each: rnn.pad_sequence(list(each), batch_first=True), *sequences)


@pytest.mark.parametrize("lengths", [[5, 0, 2], [2, 5, 3], [5, 3]], ids=str)
def test_lengths_that_do_not_fit_are_refused_as_by_torch(
    lengths: list[int], bob: sync.VirtualWorker
) -> None:
    padded = torch.randn(5, 3, 4)
    with pytest.raises(RuntimeError) as local:
        rnn.pack_padded_sequence(padded, lengths)
    with pytest.raises(RuntimeError) as remote:
        rnn.pack_padded_sequence(bob.send(padded), lengths)
    assert str(remote.value) == str(local.value)


async def test_values_that_are_here_tell_the_shape(carol: wsfed.VirtualWorker) -> None:
    x = carol.send(torch.arange(6.0).reshape(3, 2))
    chosen = x[torch.tensor([True, False, True])]
    assert chosen.shape == (2, 2)
    assert x[torch.tensor([False, False, True])].shape == (1, 2)
    assert torch.equal(await chosen, torch.tensor([[0.0, 1.0], [4.0, 5.0]]))
    repeated = x.repeat_interleave(torch.tensor([1, 2, 0]), 0)
    assert repeated.shape == (3, 2)
    assert torch.equal(await repeated, torch.tensor([[0.0, 1.0], [2.0, 3.0], [2.0, 3.0]]))


def test_lengths_that_are_there_are_fetched(bob: sync.VirtualWorker) -> None:
    padded, lengths = torch.randn(5, 3, 4), torch.tensor([2, 5, 3])
    local = rnn.pack_padded_sequence(padded, lengths, enforce_sorted=False)
    remote = rnn.pack_padded_sequence(bob.send(padded), bob.send(lengths), enforce_sorted=False)
    assert torch.equal(remote.data.get(), local.data)
    assert torch.equal(remote.batch_sizes, local.batch_sizes)


async def test_lengths_that_are_there_are_awaited_first(carol: wsfed.VirtualWorker) -> None:
    padded, lengths = carol.send(torch.randn(5, 3, 4)), carol.send(torch.tensor([5, 3, 2]))
    with pytest.raises(wsfed.ValueNeeded, match="pack_padded_sequence"):
        rnn.pack_padded_sequence(padded, lengths)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_evaluates_with_a_mask_of_padding(bob: sync.VirtualWorker) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ).eval()
    x, mask = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 3] = True
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=mask)
        bob.send(encoder)
        got = encoder(bob.send(x), src_key_padding_mask=bob.send(mask)).get()
    torch.testing.assert_close(got[~mask], expected[~mask])  # torch takes a short cut here


def test_distributions_check_what_they_are_given(bob: sync.VirtualWorker) -> None:
    mean, value = torch.tensor([0.0, 1.0]), torch.tensor([0.5, -1.0])
    expected = torch.distributions.Normal(mean, 1.0).log_prob(value)
    got = torch.distributions.Normal(bob.send(mean), 1.0).log_prob(bob.send(value))
    assert torch.equal(got.get(), expected)
