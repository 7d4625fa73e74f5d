"""The mean of several models (FedAvg: McMahan et al. 2017, algorithm 1, line 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

__all__ = ["Mean", "weighted_mean"]


def weighted_mean(
    states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
) -> dict[str, torch.Tensor]:
    """The mean of state dictionaries, ``sum(w_k * state_k) / sum(w_k)``, entry by entry.

    Sums are taken in float64 (complex128 for complex entries), in the order of the states. Buffers
    take part; those of integers are rounded to the nearest.

    Args:
        states: as ``module.state_dict()`` gives them, all with the same names and shapes.
        weights: of each, such as the rows it was trained on.

    Raises:
        ValueError: no states, names or shapes that differ, or weights that are negative, not
            finite, or all zero.
    """
    if not states or len(states) != len(weights):
        raise ValueError(f"{len(states)} states and {len(weights)} weights have no mean")
    mean = Mean()
    for state, weight in zip(states, weights, strict=True):
        mean.add(state, weight)
    return mean.result()


class Mean:
    """A weighted mean that is added up state by state: what was added need not be kept.

    Attributes:
        count: states that were added.
        weight: sum of their weights.
    """

    def __init__(self) -> None:
        self.count = 0
        self.weight = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._kinds: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, torch.Tensor], weight: float) -> None:
        """Add one.

        Raises:
            ValueError: names, shapes or dtypes differ from those of the first one, or a weight that
                is negative or not finite. Nothing was added then.
        """
        if not 0 <= weight < float("inf"):
            raise ValueError(f"a weight has to be finite and not negative: {weight}")
        if self.count:
            self._check(state)
        for name, tensor in state.items():
            exact = torch.complex128 if tensor.is_complex() else torch.float64
            if self.count:
                self._sums[name].add_(tensor.detach().to(exact), alpha=weight)
            else:
                self._sums[name] = tensor.detach().to(exact, copy=True).mul_(weight)
                self._kinds[name] = tensor.dtype
        self.count += 1
        self.weight += weight

    def _check(self, state: Mapping[str, torch.Tensor]) -> None:
        if odd := sorted(set(state) ^ set(self._sums)):
            raise ValueError(f"state {self.count} and state 0 differ in {', '.join(odd)}")
        for name, tensor in state.items():
            known, dtype = self._sums[name], self._kinds[name]
            if tensor.shape != known.shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name}: {tensor.dtype}{list(tensor.shape)} and {dtype}{list(known.shape)}"
                )

    def result(self) -> dict[str, torch.Tensor]:
        """The mean so far. Its sums are used up: add no more.

        Raises:
            ValueError: all weights are zero, or nothing was added.
        """
        if not self.weight > 0:
            raise ValueError(f"weights have to be not all 0; {self.count} states were added")
        mean = {}
        for name, dtype in self._kinds.items():
            total = self._sums.pop(name).div_(self.weight)
            if not dtype.is_floating_point and not dtype.is_complex:
                total.round_()
            mean[name] = total.to(dtype)
        return mean
