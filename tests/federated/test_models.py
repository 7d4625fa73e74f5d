"""Models that people bring are trained federated, as one site in plain torch would be."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.test_models import torchvision_models
from wsfed import federated
from wsfed.federated.recipe import Recipe

ADAM = partial(torch.optim.Adam, lr=0.01)
ROWS, LENGTH, WORDS = 48, 12, 30


def texts(seed: int) -> dict[str, torch.Tensor]:
    """Sequences of tokens; the label says whether token 1 is more frequent than token 2."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, WORDS, (ROWS, LENGTH), generator=generator)
    tokens[:, ::2] = torch.randint(1, 3, (ROWS, LENGTH // 2), generator=generator)
    labels = ((tokens == 1).sum(1) > (tokens == 2).sum(1)).long()
    return {"tokens": tokens, "labels": labels}


def images(seed: int) -> dict[str, torch.Tensor]:
    """A bright bar that lies or stands."""
    generator = torch.Generator().manual_seed(seed)
    pictures = 0.3 * torch.rand(ROWS, 1, 8, 8, generator=generator)
    labels = torch.randint(2, (ROWS,), generator=generator)
    places = torch.randint(8, (ROWS,), generator=generator)
    for picture, label, place in zip(pictures, labels, places, strict=True):
        picture[0, place if label else slice(None), slice(None) if label else place] += 1
    return {"images": pictures, "labels": labels}


class Reader(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.out = nn.Linear(16, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embed(tokens))
        out: torch.Tensor = self.out(states[:, -1])
        return out


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8 * 16, 2)),
    )


@pytest.fixture(autouse=True, scope="module")
def libraries() -> None:
    """Loaded before an event loop runs."""
    torchvision_models()  # transformers imports torchvision
    importlib.import_module("peft")


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def lora() -> nn.Module:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft, about transformers
        return peft.get_peft_model(bert(), config)


def of_outputs(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def of_transformers(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=tokens, labels=labels).loss
    return loss


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], Any]] = {
    "CNN": (cnn, images, of_outputs),
    "LSTM": (Reader, texts, of_outputs),
    "BERT": (bert, texts, of_transformers),
    "LoRA": (lora, texts, of_transformers),
}


@pytest.fixture(params=CASES)
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    make, rows, objective = CASES[request.param]
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                wsfed.VirtualWorker(name, datasets=[wsfed.Dataset("rows", rows(seed))])
            )
            for seed, name in enumerate(("alice", "bob"))
        ]
        torch.manual_seed(5)
        yield make(), rows, objective, workers


async def test_one_site_is_plain_torch(case: Any) -> None:
    model, rows, objective, workers = case
    local = copy.deepcopy(model)
    await federated.fit(
        *(model, workers[:1], "rows", None, ADAM), objective=objective, rounds=2, batch_size=16
    )
    recipe, data = Recipe(objective, ADAM), list(rows(0).values())
    for number in (1, 2):
        trained = [each for each in local.parameters() if each.requires_grad]
        optimizer = ADAM(trained)
        generator = torch.Generator().manual_seed(recipe.orders("alice", number))
        for index in torch.randperm(ROWS, generator=generator).split(16):
            optimizer.zero_grad()
            objective(local, *(field[index] for field in data)).backward()
            optimizer.step()
    for (name, mine), theirs in zip(
        model.state_dict().items(), local.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


async def test_sites_learn_together(case: Any) -> None:
    model, _, objective, workers = case
    history = await federated.fit(
        *(model, workers, "rows", None, ADAM),
        objective=objective,
        rounds=6,
        local_epochs=2,
        batch_size=16,
    )
    assert history[-1].loss < 0.98 * history[0].loss


async def test_only_adapters_travel() -> None:
    torch.manual_seed(5)
    model = lora()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    whole = sum(p.nbytes for p in model.parameters())
    assert adapters < whole / 4
    data = wsfed.Dataset("rows", texts(0))
    async with wsfed.VirtualWorker("alice", datasets=[data]) as alice:
        history = await federated.fit(
            *(model, [alice], "rows", None, ADAM),
            objective=of_transformers,
            rounds=3,
            batch_size=16,
        )
    (site,) = history[2].sites
    assert site.bytes_down < 2 * adapters + 2000
    assert site.bytes_up < 2 * adapters + 4000
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
