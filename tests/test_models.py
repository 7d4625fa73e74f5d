"""Models people use, unmodified: one training step on a worker equals the step in local torch.

Tiny sizes, random weights, nothing is downloaded.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.pointers.oracle import assert_same_bits, assert_same_state
from wsfed import sync

TOKENS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 9, dtype=torch.int64)
MASK[1, 6:] = 0
CLASSES = torch.tensor([0, 2])


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def torchvision_models() -> Any:
    """The models alone; where the wheel's compiled operators do not load, two names are missing."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_models.library = library  # type: ignore[attr-defined]
        import torchvision
    return torchvision.models


def resnet18() -> nn.Module:
    return torchvision_models().resnet18(weights=None, num_classes=5)


def vit() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2}
    return torchvision_models().VisionTransformer(
        **sizes, hidden_dim=16, mlp_dim=32, num_classes=5, dropout=0.1
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=60, intermediate_size=32, max_position_embeddings=32, **sizes)
    config.num_labels = 3
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=60,
        intermediate_size=32,
        num_key_value_heads=1,
        max_position_embeddings=32,
        **sizes,
    )
    return LlamaForCausalLM(config)


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return get_peft_model(llama(), wanted)


class Recurrent(nn.Module):
    """A language model over a recurrent layer."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.layer: Any = layer(8, 12, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(12, 60)

    def forward(self, tokens: Any) -> Any:
        output, _ = self.layer(self.embedding(tokens))
        return self.head(output)


class GraphNetwork(nn.Module):
    """Two rounds of messages along edges, mean over the neighbours, then over the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(6, 6)
        self.update = nn.GRUCell(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, nodes: Any, edges: Any) -> Any:
        source, target = edges
        for _ in range(2):
            sent = torch.relu(self.message(nodes))[source]
            count = torch.zeros_like(nodes[:, :1]).index_add(
                0, target, torch.ones_like(sent[:, :1])
            )
            mean = torch.zeros_like(nodes).index_add(0, target, sent) / count.clamp(min=1)
            nodes = self.update(mean, nodes)
        return self.head(nodes.mean(0, keepdim=True))


def of_images(size: int) -> Callable[[Any, Any], Any]:
    return lambda model, send: F.cross_entropy(model(send(images(size))), send(CLASSES))


def of_graph(model: Any, send: Any) -> Any:
    nodes = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    edges = torch.randint(0, 7, (2, 15), generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(model(send(nodes), send(edges)), send(torch.tensor([1])))


def of_next_tokens(model: Any, send: Any) -> Any:
    tokens = send(TOKENS)
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def of_tokens(**more: torch.Tensor) -> Callable[[Any, Any], Any]:
    def loss(model: Any, send: Any) -> Any:
        tokens = send(TOKENS)
        given = {name: send(value) for name, value in more.items()}
        return model(input_ids=tokens, **({"labels": tokens} | given)).loss

    return loss


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Any]]] = {
    "LSTM": (lambda: Recurrent(nn.LSTM), of_next_tokens),
    "GRU": (lambda: Recurrent(nn.GRU), of_next_tokens),
    "graph network": (GraphNetwork, of_graph),
    "ResNet-18": (resnet18, of_images(64)),
    "ViT": (vit, of_images(32)),
    "BERT": (bert, of_tokens(attention_mask=MASK, labels=CLASSES)),
    "GPT-2": (gpt2, of_tokens(attention_mask=MASK)),
    "Llama": (llama, of_tokens(attention_mask=MASK)),
    "LoRA": (lora, of_tokens()),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of these packages
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_equals_local_torch(name: str) -> None:
    make, loss_of = MODELS[name]
    torch.manual_seed(0)
    remote = make().train()
    local = copy.deepcopy(remote)
    with sync.VirtualWorker("bob") as bob:
        bob.send(remote)
        losses = []
        for model, send in ((local, lambda tensor: tensor), (remote, bob.send)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            bob.manual_seed(1)
            torch.manual_seed(1)
            loss = loss_of(model, send)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert_same_bits(losses[1], losses[0])
        assert_same_state(remote, local)


@pytest.mark.parametrize("name", ["ResNet-18", "ViT", "GPT-2", "Llama"])
async def test_nothing_waits_where_masks_stay_here(name: str) -> None:
    make, loss_of = MODELS[name]
    torch.manual_seed(0)
    remote = make().eval()
    local = copy.deepcopy(remote)
    async with wsfed.VirtualWorker("bob") as bob:
        bob.send(remote)
        keeps = {id(MASK)}
        loss = loss_of(remote, lambda t: t if id(t) in keeps else bob.send(t))
        expected = loss_of(local, lambda tensor: tensor)
        assert torch.equal((await loss.get()).detach(), expected.detach())
