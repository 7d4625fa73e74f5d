"""The model on one worker, which stays there: it is given values, trained, and asked for values."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from wsfed.federated.dpsgd import private_gradients
from wsfed.federated.recipe import Recipe, measure
from wsfed.federated.strategies.strategy import LocalTerms, State
from wsfed.pointers import modules
from wsfed.pointers.link import link_of
from wsfed.pointers.plan import Plan
from wsfed.pointers.pointer import make_sent

__all__ = ["Replica", "buffers_of", "state_of"]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What travels of a model: parameters that require grad, and buffers that are saved.

    What is frozen is sent once, when training begins.
    """
    saved = model.state_dict(keep_vars=True)
    buffers = buffers_of(model)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    return {name: saved[name] for name in saved if name in trained or name in buffers}


def buffers_of(model: nn.Module) -> frozenset[str]:
    """Names of the buffers among these."""
    saved = model.state_dict(keep_vars=True)
    return frozenset(name for name, _ in model.named_buffers() if name in saved)


def _local(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=like.dtype) if value is None else value.to(like.dtype)


def _ids(pointers: Sequence[Any]) -> list[int]:
    return [each._handle.id for each in pointers]


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Replica:
    """A copy of the model on one worker. Nothing here waits but what is awaited.

    Args:
        worker: where it is.
        model: it is copied; this one stays as it is.
        recipe: how it is trained.
        mu: of the proximal term.
        corrects: whether a correction is added to gradients.
    """

    def __init__(
        self, worker: Any, model: nn.Module, recipe: Recipe, *, mu: float, corrects: bool
    ) -> None:
        self.worker = worker
        self._recipe, self._mu = recipe, mu
        self.model: nn.Module = modules.send(copy.deepcopy(model), worker, lasting=True)
        self._entries = state_of(self.model)
        buffers = buffers_of(self.model)
        self._trained = {name: e for name, e in self._entries.items() if name not in buffers}
        self.optimizer = recipe.optimizer(self._trained.values())
        self._given = self._copies() if mu else {}
        self._correction = self._copies() if corrects else {}
        self._load, self._load_correction = Plan(self._loaded), Plan(self._corrected)
        self._clip = Plan(self._clipped)
        self.step, self.judge = Plan(self._stepped), Plan(self._judged)
        self._traffic: tuple[int, int] = worker.traffic
        self._slopes: dict[int, Plan[..., Any]] = {}
        #: The values that were given last, as pointers, and what they can be told by.
        self._sent: list[Any] = []
        self._sent_of: Callable[[], torch.Tensor | None] = lambda: None

    def _copies(self) -> dict[str, Any]:
        with torch.no_grad():
            return {name: each.detach().clone() for name, each in self._trained.items()}

    def take_traffic(self) -> tuple[int, int]:
        """Bytes to and from the worker since this was asked last."""
        before, self._traffic = self._traffic, self.worker.traffic
        return self._traffic[0] - before[0], self._traffic[1] - before[1]

    # --- values ---

    def give(self, state: State, terms: LocalTerms) -> None:
        """Set the model to these values, and forget the optimizer's state."""
        mark = next(iter(state.values()))
        if self._sent_of() is not mark:
            link = link_of(self.worker)
            self._sent = [make_sent(link, state[n].detach(), lasting=True) for n in self._entries]
            self._sent_of = weakref.ref(mark)
        self._load(self._sent)
        if self._correction:
            values = [_local(terms.correction.get(name), e) for name, e in self._correction.items()]
            self._load_correction(self.worker.send(values))
        self.optimizer.state.clear()

    def clip(self, bound: float) -> Awaitable[torch.Tensor]:
        """Bring the change since the values were given to an L2 norm of at most ``bound``.

        What is no fractional number goes back to what was given.

        Returns:
            Whether it was within the bound, 1 or 0.
        """
        bound_there = self.worker.send(torch.tensor(bound, dtype=torch.float64))
        within: Awaitable[torch.Tensor] = self._clip(self._sent, bound_there).get()
        return within

    def _clipped(self, given: Sequence[torch.Tensor], bound: torch.Tensor) -> Any:
        with torch.no_grad():
            pairs = [
                (entry, before)
                for entry, before in zip(self._entries.values(), given, strict=True)
                if entry.is_floating_point()
            ]
            squares = [(e.detach() - b).double().square().sum() for e, b in pairs]
            norm = torch.stack(squares).sum().sqrt()
            factor = (bound / norm.clamp(min=1e-30)).clamp(max=1.0)
            for entry, before in pairs:
                change = (entry.detach() - before).double() * factor
                entry.copy_(before + change.to(entry.dtype))
            for entry, before in zip(self._entries.values(), given, strict=True):
                if not entry.is_floating_point():
                    entry.copy_(before)
            return (norm <= bound).double()

    def slope(self, rows: int) -> Plan[..., Any]:
        """What adds a batch's part to the gradient of the mean loss over so many rows."""
        for parameter in self._trained.values():
            parameter.grad = None
        if rows not in self._slopes:
            self._slopes[rows] = Plan(partial(self._sloped, rows))
        return self._slopes[rows]

    def ask_slope(self) -> Awaitable[Sequence[torch.Tensor]]:
        """The gradients, and the values of buffers, in the order of :func:`state_of`."""
        asked: Awaitable[Sequence[torch.Tensor]] = modules.get(
            [
                entry if name not in self._trained else _gradient(entry)
                for name, entry in self._entries.items()
            ]
        )
        return asked

    def secure_ids(self, step: int, *, gradients: bool) -> tuple[list[int], list[int]]:
        """What a step of secure aggregation is about: values, and the model that was given."""
        if step == 0:
            return [], _ids(self._sent)
        if step != 3:
            return [], []
        if gradients:
            return _ids([_gradient(each) for each in self._trained.values()]), []
        pairs = zip(self._entries.values(), self._sent, strict=True)
        fractional = [(value, given) for value, given in pairs if value.is_floating_point()]
        return _ids([value for value, _ in fractional]), _ids([given for _, given in fractional])

    def ask(self) -> Awaitable[Sequence[torch.Tensor]]:
        """The values, in the order of :func:`state_of`. The request has left."""
        asked: Awaitable[Sequence[torch.Tensor]] = modules.get(list(self._entries.values()))
        return asked

    def named(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """These values by name."""
        return {name: v.detach() for name, v in zip(self._entries, values, strict=True)}

    # --- what is recorded ---

    def _loaded(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for entry, value in zip(self._entries.values(), values, strict=True):
                entry.copy_(value)
            for name, given in self._given.items():
                given.copy_(self._entries[name])

    def _corrected(self, values: Sequence[torch.Tensor]) -> None:
        for entry, value in zip(self._correction.values(), values, strict=True):
            entry.copy_(value)

    def _stepped(self, *batch: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self._differentiated(batch)
        with torch.no_grad():
            for name, parameter in self._trained.items():
                if parameter.grad is None:
                    continue
                if self._mu:
                    drift = parameter.detach() - self._given[name]
                    parameter.grad.add_(drift, alpha=self._mu)
                if self._correction:
                    parameter.grad.add_(self._correction[name])
        self.optimizer.step()
        return loss

    def _differentiated(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        """Set gradients; gives the loss."""
        objective, dpsgd = self._recipe.objective, self._recipe.dpsgd
        if dpsgd is None:
            loss = objective(self.model, *batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        *fields, weights = batch
        # A batch by sampling has more rows than are expected, or all there are.
        expected = min(self._recipe.batch_size or len(weights), len(weights))
        return private_gradients(dpsgd, self.model, objective, fields, weights, expected)

    def _judged(self, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return measure(self._recipe, self.model, batch)

    def _sloped(self, rows: int, *batch: torch.Tensor) -> torch.Tensor:
        loss = self._recipe.objective(self.model, *batch)
        (loss * (len(batch[0]) / rows)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
