"""The model on one worker, which stays there: it is given values, trained, and asked for values."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from wsfed.federated.broadcast import Broadcast
from wsfed.federated.compression import Scheme, is_compressed
from wsfed.federated.dpsgd import private_gradients
from wsfed.federated.recipe import Recipe, measure, one_number
from wsfed.federated.state import buffers_of, state_of
from wsfed.federated.strategies.strategy import LocalTerms, State
from wsfed.pointers import modules
from wsfed.pointers.link import link_of
from wsfed.pointers.plan import Plan
from wsfed.pointers.pointer import make_pointer, make_sent
from wsfed.pointers.site import capture_site
from wsfed.protocol import messages as m

__all__ = ["Asked", "Replica"]


def _local(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=like.dtype) if value is None else value.to(like.dtype)


def _added(change: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Their sum in the value's dtype, in the change's memory where that has room for it."""
    wide = torch.promote_types(change.dtype, value.dtype)
    return change.to(wide).add_(value).to(value.dtype)


def _ids(pointers: Sequence[Any]) -> list[int]:
    return [each._handle.id for each in pointers]


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@dataclass(frozen=True, slots=True)
class _Held:
    """A value that the worker was given: as a pointer, and what it is."""

    digest: bytes
    there: Any


@dataclass(frozen=True, slots=True)
class Asked:
    """Values of the model that were asked for.

    Attributes:
        values: once they are there; see :meth:`Replica.named`.
        residual: what the worker keeps for the next round of the site, as a pointer.
    """

    values: Awaitable[Sequence[torch.Tensor]]
    residual: Any = None


class Replica:
    """A copy of the model on one worker. Nothing here waits but what is awaited.

    Args:
        worker: where it is.
        model: it is copied; this one stays as it is.
        recipe: how it is trained.
        mu: of the proximal term.
        corrects: whether a correction is added to gradients.
        broadcast: the model as it goes to all workers.
        digests: of what the model is now, by name, as it would be sent.
        scheme: how changes travel; ``None`` for values that travel as they are.

    Attributes:
        turn: how often it was given values.
    """

    def __init__(
        self,
        worker: Any,
        model: nn.Module,
        recipe: Recipe,
        *,
        mu: float,
        corrects: bool,
        broadcast: Broadcast,
        digests: Mapping[str, bytes],
        scheme: Scheme | None = None,
    ) -> None:
        self.worker, self.turn = worker, 0
        self._recipe, self._mu = recipe, mu
        self.model: nn.Module = modules.send(copy.deepcopy(model), worker, lasting=True)
        self._entries = state_of(self.model)
        buffers = buffers_of(self.model)
        self._trained = {name: e for name, e in self._entries.items() if name not in buffers}
        self._scheme = scheme
        self._changing = {
            name: entry
            for name, entry in self._entries.items()
            if scheme is not None and is_compressed(name, entry, buffers)
        }
        self.optimizer = recipe.optimizer(self._trained.values())
        self._given = self._copies() if mu else {}
        self._correction = self._copies() if corrects else {}
        self._load, self._load_correction = Plan(self._loaded), Plan(self._corrected)
        self._clip, self._encode = Plan(self._clipped), Plan(self._encoded)
        self.step, self.judge = Plan(self._stepped), Plan(self._judged)
        self._traffic: tuple[int, int] = worker.traffic
        self._slopes: dict[int, Plan[..., Any]] = {}
        self._broadcast = broadcast
        #: The values that were given last.
        self._held: dict[str, _Held] = {}
        #: What the model is there now, as far as nothing has changed it.
        self._left = dict(digests)

    def _copies(self) -> dict[str, Any]:
        with torch.no_grad():
            return {name: each.detach().clone() for name, each in self._trained.items()}

    def take_traffic(self) -> tuple[int, int]:
        """Bytes to and from the worker since this was asked last."""
        before, self._traffic = self._traffic, self.worker.traffic
        return self._traffic[0] - before[0], self._traffic[1] - before[1]

    # --- values ---

    def give(self, state: State, terms: LocalTerms) -> None:
        """Set the model to these values, and forget the optimizer's state.

        What the worker has been given before, or what is there as training has left it, is not
        sent.
        """
        for name, entry in self._entries.items():
            self._held[name] = self._hold(name, entry, state[name])
        self.turn, self._left = self.turn + 1, {}
        self._load(self._sent)
        if self._correction:
            values = [_local(terms.correction.get(name), e) for name, e in self._correction.items()]
            self._load_correction(self.worker.send(values))
        self.optimizer.state.clear()

    def _hold(self, name: str, entry: torch.Tensor, value: torch.Tensor) -> _Held:
        part, held = self._broadcast.part(name, value), self._held.get(name)
        if held is not None and held.digest == part.digest:
            return held
        if self.rules is None and self._left.get(name) == part.digest:
            with torch.no_grad():
                return _Held(part.digest, entry.detach().to(part.dtype, copy=True))
        sent = value.detach() if part.cast is None else part.cast
        return _Held(part.digest, make_sent(link_of(self.worker), sent, lasting=True, sealed=True))

    @property
    def _sent(self) -> list[Any]:
        """The values that were given last, as pointers."""
        return [held.there for held in self._held.values()]

    @property
    def compresses(self) -> bool:
        """Whether changes travel in place of values."""
        return self._scheme is not None

    def remember(self, digests: Mapping[str, bytes], turn: int) -> None:
        """This is what the model was when it was asked for, in that turn."""
        if self.turn == turn:
            self._left = dict(digests)

    def clip(self, bound: float) -> Awaitable[torch.Tensor]:
        """Bring the change since the values were given to an L2 norm of at most ``bound``.

        What is no fractional number goes back to what was given.

        Returns:
            Whether it was within the bound, 1 or 0.
        """
        bound_there = self.worker.send(torch.tensor(bound, dtype=torch.float64))
        within: Awaitable[torch.Tensor] = self._clip(self._sent, bound_there).get()
        return within

    @property
    def rules(self) -> Mapping[str, float] | None:
        """What its owner lets leave, where that is not all: ``clip`` and ``noise``, at best."""
        told: Mapping[str, float] | None = self.worker.info.get("releases")
        return told

    def ask_release(self, clip: float) -> Asked:
        """The values as a strict worker lets them leave, changed by ``clip`` at most."""
        rules, link = self.rules, link_of(self.worker)
        assert rules is not None
        entries = list(self._entries.values())
        outs = [link.new_id() for _ in entries]
        command = m.Release(
            *(_ids(entries), _ids(self._sent), outs),
            *(float(min(clip, rules["clip"])), float(rules["noise"])),
        )
        link.issue(command.wire(), capture_site())
        released = [
            make_pointer(link, id, each.shape, each.dtype)
            for id, each in zip(outs, entries, strict=True)
        ]
        return Asked(modules.get(released))

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

    def ask_slope(self) -> Asked:
        """The gradients, and the values of buffers."""
        return Asked(
            modules.get(
                [
                    entry if name not in self._trained else _gradient(entry)
                    for name, entry in self._entries.items()
                ]
            )
        )

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

    def ask(self, residual: Any = None) -> Asked:
        """The values, or what has changed of them. The request has left.

        Args:
            residual: what the site's last round has kept on the worker.
        """
        if self._scheme is None:
            return Asked(modules.get(list(self._entries.values())))
        given = [self._held[name].there for name in self._changing]
        told, kept = self._encode(given, residual)
        exact = [entry for name, entry in self._entries.items() if name not in self._changing]
        return Asked(modules.get([*exact, *told]), kept)

    def named(self, values: Sequence[torch.Tensor], state: State) -> dict[str, torch.Tensor]:
        """The values by name, of what was asked for.

        Args:
            values: they are used up.
            state: the values that the site began with.

        Raises:
            ValueError: the worker says what it cannot have found so.
        """
        names = [name for name in self._entries if name not in self._changing]
        found = {name: v.detach() for name, v in zip(names, values, strict=False)}
        if self._scheme is not None:
            told = [value.detach() for value in values[len(names) :]]
            given = [state[name] for name in self._changing]
            changes = self._scheme.decode(told, [value.shape for value in given])
            for name, value, change in zip(self._changing, given, changes, strict=True):
                found[name] = _added(change, value)
        return {name: found[name] for name in self._entries}

    # --- what is recorded ---

    def _loaded(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for entry, value in zip(self._entries.values(), values, strict=True):
                entry.copy_(value)
            for name, given in self._given.items():
                given.copy_(self._entries[name])

    def _encoded(
        self, given: Sequence[torch.Tensor], residual: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        assert self._scheme is not None
        with torch.no_grad():
            pairs = zip(self._changing.values(), given, strict=True)
            return self._scheme.encode([entry.detach() - had for entry, had in pairs], residual)

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
            loss = one_number(objective(self.model, *batch))
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
        loss = one_number(self._recipe.objective(self.model, *batch))
        (loss * (len(batch[0]) / rows)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
