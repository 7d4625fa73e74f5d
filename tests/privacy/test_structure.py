"""Models of another structure, and layers that single out rows, are found by their values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wsfed import federated
from wsfed.privacy.structure import check_rows, check_structure, share_alike, structure_of


def values_of(model: nn.Module) -> list[torch.Tensor]:
    return [each.detach() for each in model.state_dict().values()]


def imprint(width: int, rows: int, blur: float = 0.0) -> torch.Tensor:
    """Every neuron measures the same; blurred by so much of its length."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.full((rows, width), width**-0.5)
    return weight + blur * width**-0.5 * torch.randn(rows, width, generator=generator)


# --- structure -----------------------------------------------------------------------------------


def test_the_structure_is_that_of_dtypes_and_shapes_in_order() -> None:
    """A known answer, which owners have signed: it does not change."""
    values = [torch.zeros(2, 3), torch.zeros(2), torch.zeros((), dtype=torch.int64)]
    assert structure_of(values) == (
        "3fdc5ae2a0f1265321f3a6472820e85cfea8d4ca449015156d389d0138530573"
    )


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(3, 4),
        nn.Linear(4, 3).double(),
        nn.Linear(4, 3, bias=False),
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(12, 1, bias=False), nn.Linear(3, 1, bias=False)),
    ],
    ids=str,
)
def test_another_structure_is_refused(other: nn.Module) -> None:
    agreed = values_of(nn.Linear(4, 3))
    check_structure(structure_of(agreed), values_of(nn.Linear(4, 3)))
    check_structure("", values_of(other))
    with pytest.raises(ValueError, match="another structure than the roster's"):
        check_structure(structure_of(agreed), values_of(other))


def test_the_same_values_in_another_order_are_another_structure() -> None:
    weight, bias = torch.zeros(3, 4), torch.zeros(3)
    assert structure_of([weight, bias]) != structure_of([bias, weight])


def test_owners_tell_the_structure_of_what_travels() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert federated.arch_hash(model) == structure_of(values_of(model))
    model[0].requires_grad_(False)
    assert federated.arch_hash(model) == structure_of(values_of(model)[2:])


# --- rows alike ----------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-12])
def test_near_identical_rows_are_found(blur: float, scale: float) -> None:
    weight = imprint(100, 64, blur) * scale
    assert share_alike(weight) > 0.99
    with pytest.raises(ValueError, match=r"value 1 of the model, \[64, 100\], .* of the rows are"):
        check_rows([torch.zeros(3), weight], 0.01)


def test_rows_that_are_alike_but_for_their_sign_or_length_are_found() -> None:
    lengths = torch.linspace(-2, 3, 64)[:, None]
    assert share_alike(imprint(100, 64) * lengths) == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rows_of_every_dtype_are_looked_at(dtype: torch.dtype) -> None:
    assert share_alike(imprint(100, 64).to(dtype)) == 1.0


def test_a_few_rows_alike_among_many_others_are_within_what_is_allowed() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 50)
    weight[7] = weight[9]
    assert share_alike(weight) == pytest.approx(2 / 200)
    check_rows([weight], 0.01)
    with pytest.raises(ValueError, match="are alike"):
        check_rows([weight], 0.0)


def test_a_part_of_a_large_layer_is_found_by_a_sample() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5000, 32)
    check_rows([weight], 0.0)
    weight[::5] = imprint(32, 1000)
    with pytest.raises(ValueError, match=r"of the rows are alike"):
        check_rows([weight], 0.01)


def test_kernels_and_transposed_layers_are_looked_at() -> None:
    torch.manual_seed(0)
    kernel = imprint(75, 32).reshape(32, 3, 5, 5)
    transposed = torch.randn(100, 64)
    transposed[:, ::2] = imprint(100, 32).T * torch.randn(100, 1)
    for value, kind in ((kernel, "rows"), (transposed, "columns")):
        with pytest.raises(ValueError, match=f"of the {kind} are alike"):
            check_rows([value], 0.01)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(784, 256),
        nn.Conv2d(3, 64, 3),
        nn.Embedding(2000, 16, padding_idx=0),
        nn.LSTM(16, 32),
        nn.TransformerEncoderLayer(32, 4, 64),
        nn.LayerNorm(64),
        nn.Linear(1, 64),
    ],
    ids=str,
)
def test_honest_layers_are_let_be(model: nn.Module) -> None:
    check_rows(values_of(model), 0.01)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(16, 16),
        torch.ones(16, 16, dtype=torch.int64),
        torch.zeros(0, 16),
        torch.ones(1, 16),
        torch.ones(16),
        torch.full((16, 16), float("nan")),
    ],
    ids=lambda value: f"{list(value.shape)} {value.dtype}",
)
def test_what_measures_nothing_is_let_be(value: torch.Tensor) -> None:
    check_rows([value], 0.0)


def test_an_owner_may_look_away() -> None:
    check_rows([imprint(100, 64)], 1.0)


def test_looking_at_rows_draws_nothing_from_torchs_generator() -> None:
    torch.manual_seed(5)
    weight, before = torch.randn(2000, 16), torch.get_rng_state()
    check_rows([weight], 0.5)
    assert torch.equal(torch.get_rng_state(), before)
