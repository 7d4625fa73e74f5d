"""A server optimizer (Reddi et al. 2021, *Adaptive federated optimization*, algorithm 2).

The mean change of the sites, ``D = mean(w_k) - w``, is handed to the optimizer as the gradient
``-D``. So ``torch.optim.SGD`` with a learning rate of 1 is federated averaging, with momentum it is
FedAvgM (Hsu et al. 2019), and any other optimizer of torch's does as well.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch

from wsfed.federated.strategies.strategy import MeanStrategy, Memory, State

__all__ = ["FedAdagrad", "FedAdam", "FedOpt", "FedYogi", "ServerOptimizer"]

#: Makes an optimizer of parameters: ``partial(torch.optim.Adam, lr=0.01)``.
ServerOptimizer: TypeAlias = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


class FedOpt(MeanStrategy):
    """The server's step is that of an optimizer of torch's.

    Args:
        optimizer: makes one of parameters.

    Attributes:
        optimizer: what it is called.
    """

    def __init__(self, optimizer: ServerOptimizer) -> None:
        self._make = optimizer
        # What it is set to is checked now.
        self.optimizer = type(optimizer([torch.zeros(1, requires_grad=True)])).__name__

    def step(self, state: State, memory: Memory, mean: State) -> tuple[State, Memory]:
        """One step with the gradient ``w - mean(w_k)``; the optimizer's state is the memory."""
        return self.descend(state, memory, {name: state[name] - mean[name] for name in state})

    def descend(self, state: State, memory: Memory, gradient: State) -> tuple[State, Memory]:
        """One step with a gradient.

        Args:
            state: what is trained; it is left as it is.
            memory: the optimizer's state, as the last step left it.
            gradient: of the same names as ``state``.
        """
        parameters = {name: value.detach().clone() for name, value in state.items()}
        optimizer = self._make(parameters.values())
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
            optimizer.state[parameter].update(_own(memory, name))
        optimizer.step()
        kept = {
            f"{name}/{word}": torch.as_tensor(value)
            for name, parameter in parameters.items()
            for word, value in optimizer.state[parameter].items()
            if value is not None
        }
        return parameters, kept


def _own(memory: Memory, name: str) -> dict[str, Any]:
    """What the memory holds of one entry, by the optimizer's own words."""
    found = {}
    for key, value in memory.items():
        owner, _, word = key.rpartition("/")
        if owner == name:
            found[word] = value.clone()
    return found


class _Adaptive(MeanStrategy):
    """What the three of the paper have in common; ``v`` differs."""

    def __init__(
        self, lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
    ) -> None:
        if not (lr > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and tau > 0):
            raise ValueError(
                f"{self.name}: lr and tau have to be positive, beta1 and beta2 in [0, 1): "
                f"lr={lr}, beta1={beta1}, beta2={beta2}, tau={tau}"
            )
        self.lr, self.beta1, self.beta2, self.tau = lr, beta1, beta2, tau

    def step(self, state: State, memory: Memory, mean: State) -> tuple[State, Memory]:
        """``m = beta1 * m + (1 - beta1) * D``, ``w = w + lr * m / (sqrt(v) + tau)``."""
        stepped, kept = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for name, value in state.items():
            change = mean[name] - value
            m = memory.get(f"{name}/m", torch.zeros_like(value))
            v = memory.get(f"{name}/v", torch.full_like(value, self.tau**2))
            m = self.beta1 * m + (1 - self.beta1) * change
            v = self.second_moment(v, change.square())
            stepped[name] = value + self.lr * m / (v.sqrt() + self.tau)
            kept |= {f"{name}/m": m, f"{name}/v": v}
        return stepped, kept

    @abstractmethod
    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The next ``v``, from the last one and ``D ** 2``."""


class FedAdagrad(_Adaptive):
    """``v = v + D ** 2`` (Reddi et al. 2021); no bias correction, ``v`` begins at ``tau ** 2``."""

    def __init__(self, lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(lr, beta1, 0.0, tau)

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The sum of squares."""
        return v + square


class FedYogi(_Adaptive):
    """``v = v - (1 - beta2) * D ** 2 * sign(v - D ** 2)`` (Reddi et al. 2021)."""

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Moves towards the square at a rate that does not depend on ``v``."""
        return v - (1 - self.beta2) * square * (v - square).sign()


class FedAdam(_Adaptive):
    """``v = beta2 * v + (1 - beta2) * D ** 2`` (Reddi et al. 2021)."""

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The moving mean of squares."""
        return self.beta2 * v + (1 - self.beta2) * square
