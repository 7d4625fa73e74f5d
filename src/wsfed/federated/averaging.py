"""The mean of several models (FedAvg: McMahan et al. 2017, algorithm 1, line 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

__all__ = ["weighted_mean"]


def weighted_mean(
    states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """The mean of state dictionaries, ``sum(w_k * state_k) / sum(w_k)``, entry by entry.

    Sums are taken in float64 (complex128 for complex entries), so that the order of the states
    shows in the last bit of float32 at most. Buffers take part; those of integers are rounded to
    the nearest.

    Args:
        states: as ``module.state_dict()`` gives them, all with the same names and shapes.
        weights: of each, such as the rows it was trained on.

    Raises:
        ValueError: no states, names or shapes that differ, or weights that are negative, not
            finite, or all zero.
    """
    if not states or len(states) != len(weights):
        raise ValueError(f"{len(states)} states and {len(weights)} weights have no mean")
    total = float(sum(weights))
    if not all(0 <= weight < float("inf") for weight in weights) or total <= 0:
        raise ValueError(f"weights have to be finite, not negative, and not all 0: {weights}")
    names = list(states[0])
    for number, state in enumerate(states):
        if set(state) != set(names):
            odd = sorted(set(state) ^ set(names))
            raise ValueError(f"state {number} and state 0 differ in {', '.join(odd)}")
    return {
        name: _mean(name, [state[name] for state in states], [w / total for w in weights])
        for name in names
    }


def _mean(name: str, tensors: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    first = tensors[0]
    for tensor in tensors:
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                f"{name}: {tensor.dtype}{list(tensor.shape)} and {first.dtype}{list(first.shape)}"
            )
    exact = torch.complex128 if first.is_complex() else torch.float64
    total = torch.zeros(first.shape, dtype=exact)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.detach().to(exact), alpha=share)
    if not first.is_floating_point() and not first.is_complex():
        total = total.round()
    return total.to(first.dtype)
