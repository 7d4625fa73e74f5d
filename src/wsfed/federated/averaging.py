"""The mean of several models (FedAvg: McMahan et al. 2017, algorithm 1, line 8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

__all__ = ["Mean", "weighted_mean"]

#: States that are held before they are summed up.
_HELD: Final = 2
#: Elements that are converted at a time, so that they stay in the processor's cache.
_PART: Final = 2**17


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

    Args:
        owns: what is added is given away: the mean may be made in its memory.

    Attributes:
        count: states that were added.
        weight: sum of their weights.
    """

    def __init__(self, *, owns: bool = False) -> None:
        self.count = 0
        self.weight = 0.0
        self._owns = owns
        #: The first ones as they are: two of them take no more memory than their exact sum.
        self._held: list[tuple[Mapping[str, torch.Tensor], float]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._kinds: dict[str, tuple[torch.dtype, torch.Size]] = {}

    def add(self, state: Mapping[str, torch.Tensor], weight: float) -> None:
        """Add one. It must not be changed before :meth:`result`.

        Raises:
            ValueError: names, shapes or dtypes differ from those of the first one, or a weight that
                is negative or not finite. Nothing was added then.
        """
        if not 0 <= weight < float("inf"):
            raise ValueError(f"a weight has to be finite and not negative: {weight}")
        if self.count:
            self._check(state)
        else:
            self._kinds = {name: (each.dtype, each.shape) for name, each in state.items()}
        self.count += 1
        self.weight += weight
        self._held.append((state, weight))
        if self.count > _HELD:
            self._sum_up()

    def _sum_up(self) -> None:
        for name, (dtype, shape) in self._kinds.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(shape.numel(), dtype=_exact(dtype))
            for part, summed in self._parts(self._sums[name]):
                self._add_to(summed, name, part)
        self._held.clear()

    @staticmethod
    def _parts(whole: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """So many elements at a time that they stay in the processor's cache."""
        for start in range(0, whole.numel(), _PART):
            yield slice(start, start + _PART), whole[start : start + _PART]

    def _add_to(self, summed: torch.Tensor, name: str, part: slice) -> None:
        for state, weight in self._held:
            value = state[name].detach().reshape(-1)[part]
            summed.add_(value.to(summed.dtype), alpha=weight)

    def _check(self, state: Mapping[str, torch.Tensor]) -> None:
        if odd := sorted(set(state) ^ set(self._kinds)):
            raise ValueError(f"state {self.count} and state 0 differ in {', '.join(odd)}")
        for name, tensor in state.items():
            dtype, shape = self._kinds[name]
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name}: {tensor.dtype}{list(tensor.shape)} and {dtype}{list(shape)}"
                )

    def result(self) -> dict[str, torch.Tensor]:
        """The mean so far. Its sums are used up: add no more.

        Raises:
            ValueError: all weights are zero, or nothing was added.
        """
        if not self.weight > 0:
            raise ValueError(f"weights have to be not all 0; {self.count} states were added")
        return {name: self._result_of(name) for name in self._kinds}

    def _result_of(self, name: str) -> torch.Tensor:
        dtype, shape = self._kinds[name]
        first = self._held[0][0][name] if self._held else None
        if self._owns and first is not None and first.is_contiguous():
            mean = first.detach().view(-1)
        else:
            mean = torch.empty(shape.numel(), dtype=dtype)
        total = self._sums.pop(name, None)
        for part, made in self._parts(mean):
            exact = torch.zeros(len(made), dtype=_exact(dtype)) if total is None else total[part]
            self._add_to(exact, name, part)
            exact.div_(self.weight)
            made.copy_(exact if dtype.is_floating_point or dtype.is_complex else exact.round_())
        return mean.view(shape)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64
