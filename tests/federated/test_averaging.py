"""The mean of models is the paper's formula, exactly, buffers included."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from wsfed.federated.averaging import weighted_mean


def test_the_mean_is_that_of_exact_fractions() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(7, generator=generator)} for _ in range(3)]
    weights = [10, 20, 5]
    mean = weighted_mean(states, weights)["w"]
    for index in range(7):
        exact = sum(
            (
                Fraction(w) * Fraction(float(s["w"][index]))
                for w, s in zip(weights, states, strict=True)
            ),
            Fraction(0),
        ) / sum(weights)
        assert float(mean[index]) == torch.tensor(float(exact), dtype=torch.float32).item()


def test_buffers_take_part_and_integers_are_rounded() -> None:
    models = [nn.BatchNorm1d(2) for _ in range(2)]
    for count, model in enumerate(models):
        for _ in range(count * 3 + 1):
            model(torch.randn(4, 2) + count)
    mean = weighted_mean([model.state_dict() for model in models], [1, 1])
    means = [model.running_mean for model in models]
    assert torch.equal(mean["running_mean"], (means[0] + means[1]) / 2)  # type: ignore[operator]
    assert (
        mean["num_batches_tracked"].item() == 2 and mean["num_batches_tracked"].dtype == torch.int64
    )


def test_one_model_is_its_own_mean() -> None:
    state = nn.Linear(3, 2).state_dict()
    mean = weighted_mean([state], [7])
    assert all(torch.equal(mean[name], state[name]) for name in state)


def test_dtypes_are_kept() -> None:
    state = {
        "half": torch.ones(2, dtype=torch.float16),
        "double": torch.ones(2, dtype=torch.float64),
        "complex": torch.ones(2, dtype=torch.complex64),
        "flag": torch.tensor([True, False]),
    }
    mean = weighted_mean([state, state], [1, 3])
    assert {name: t.dtype for name, t in mean.items()} == {n: t.dtype for n, t in state.items()}
    assert torch.equal(mean["flag"], state["flag"])


@pytest.mark.parametrize(
    ("states", "weights", "says"),
    [
        ([], [], "have no mean"),
        ([{"a": torch.ones(1)}], [1, 2], "have no mean"),
        ([{"a": torch.ones(1)}], [0], "not all 0"),
        ([{"a": torch.ones(1)}] * 2, [1, -1], "not negative"),
        ([{"a": torch.ones(1)}], [float("nan")], "finite"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [1, 1], "differ in a, b"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], [1, 1], r"a: torch.float32\[2\]"),
    ],
)
def test_what_has_no_mean_is_refused(states: list, weights: list, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        weighted_mean(states, weights)
