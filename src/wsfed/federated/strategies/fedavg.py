"""Federated averaging (McMahan et al. 2017, *Communication-efficient learning of deep networks from
decentralized data*, algorithm 1)."""

from __future__ import annotations

from wsfed.federated.strategies.strategy import MeanStrategy, Memory, State

__all__ = ["FedAvg"]


class FedAvg(MeanStrategy):
    """The next model is the mean of the sites', ``sum(n_k * w_k) / sum(n_k)``, with buffers."""

    def step(self, state: State, memory: Memory, mean: State) -> tuple[State, Memory]:
        """The mean itself."""
        return mean, memory
