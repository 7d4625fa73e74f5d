"""What an optimizer's step does now, asked of torch's own ``step()``.

Its numbers come from Python: a learning rate that a schedule changes, a count of steps. With
torch's own optimizers they are the same for all parameters of a group that have made as many steps.
So where one parameter of each group has told all numbers once, only these are asked from then on,
as long as everything else is as it was. Other optimizers are asked in full.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch

from wsfed.pointers.kept import Use
from wsfed.pointers.pointer import Pointer
from wsfed.pointers.recording import Part, Recording

__all__ = [
    *("Stepper", "check_held", "hold", "let_go", "own_state", "rates_of", "set_own_state"),
]


#: Runs that may end early, by the optimizers that have counted all their steps already.
_HELD: Final[weakref.WeakKeyDictionary[torch.optim.Optimizer, Any]] = weakref.WeakKeyDictionary()


def hold(optimizer: torch.optim.Optimizer, run: Any) -> None:
    """No plan steps with this optimizer until it is known how many steps this run has made."""
    _HELD[optimizer] = run


def let_go(optimizer: torch.optim.Optimizer, run: Any = None) -> None:
    """It is known (for this run; for any by default)."""
    if run is None or _HELD.get(optimizer) is run:
        _HELD.pop(optimizer, None)


def check_held(optimizer: torch.optim.Optimizer, recording: Recording) -> None:
    """Whether a step can be asked for.

    Raises:
        PlanError: a run that may end early is under way.
    """
    if optimizer in _HELD:
        recording.refuse(
            "its optimizer does not know yet how many steps a run that may end early will make: "
            "await that run first"
        )


class Stepper:
    """Asks one optimizer what its step does, again and again.

    Args:
        optimizer: torch's, or one that is written like them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._use: Use | None = None
        self._looks: Any = None
        #: What a sample does, if it tells all numbers.
        self._key: bytes | None = None
        self._rates: list[Any] | None = None
        self._numbers: list[float] = []

    def step(self, recording: Recording) -> Use:
        """What it does now; afterwards it has counted one step more."""
        check_held(self._optimizer, recording)
        looks = self._look()
        is_same = looks == self._looks
        if is_same and (numbers := self.quick(recording)) is not None:
            assert self._use is not None
            return replace(self._use, part=replace(self._use.part, numbers=numbers))
        expected = self._expect(recording) if is_same and self._may_sample() else None
        part = recording.step_again(self._optimizer)
        use = Use.of_step(part, recording.metas)
        is_steady = self._use is not None and self._use.key == use.key
        knows = expected is not None and is_steady and expected.numbers == part.numbers
        self._key = expected.key if expected is not None and knows else None
        self._use, self._looks, self._rates = use, looks, None
        return use

    def quick(self, recording: Recording) -> list[float] | None:
        """The numbers of the step, if a sample tells them; else it has not been asked."""
        if self._key is None or not self._may_sample():
            return None
        before = _own_state_of_sample(self._optimizer)
        # What counts nothing here does the same until it is set to something else.
        rates = None if any(values for _, values in before) else rates_of(self._optimizer)
        if rates is not None and rates == self._rates:
            return self._numbers
        part = self._sample(recording)
        if part.key == self._key:
            _spread(self._optimizer)
            self._rates, self._numbers = rates, part.numbers
            return part.numbers
        _put_back(before)  # it takes another branch
        self._key = None
        return None

    def _may_sample(self) -> bool:
        """Whether asking of a part of the parameters, or once more, changes nothing else."""
        optimizer = self._optimizer
        hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        return type(optimizer).__module__.startswith("torch.optim.") and not any(hooks)

    def _expect(self, recording: Recording) -> Part:
        """What a sample says; it is taken back."""
        before = _own_state_of_sample(self._optimizer)
        part = self._sample(recording)
        _put_back(before)
        return part

    def _sample(self, recording: Recording) -> Part:
        parts = list(recording.parts)
        with _one_of_each_group(self._optimizer):
            part = recording.step_again(self._optimizer)
        recording.parts[:] = parts
        return part

    def _look(self) -> Any:
        """Everything but numbers that a step depends on: what is there, and where."""
        found: list[Any] = []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = parameter.__dict__
                node, handle = state.get("_node"), state.get("_handle")
                found.append(id(parameter))
                found.append(None if handle is None else handle.id)
                found.append(None if handle is None else handle.link)
                found.append(node is not None and node.has_grad)
                for name, value in self._optimizer.state.get(parameter, {}).items():
                    found.append(name)
                    if type(value) is Pointer:
                        found.append(value._handle.id)
        return found


def _first_of(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[Any]:
    """The first parameter of a group that has a gradient."""
    for parameter in group["params"]:
        node = parameter.__dict__.get("_node")
        if node is not None and node.has_grad:
            return [parameter]
    return []


def _own_state_of_sample(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], Any]]:
    """The states of the sampled parameters, each with a copy of what it counts here."""
    states = [
        optimizer.state.get(first, {})
        for group in optimizer.param_groups
        for first in _first_of(optimizer, group)
    ]
    return [
        (
            state,
            {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in state.items()
                if type(value) is not Pointer
            },
        )
        for state in states
    ]


def _put_back(kept: list[tuple[dict[str, Any], Any]]) -> None:
    for state, values in kept:
        state.update(values)


@contextmanager
def _one_of_each_group(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    kept = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = _first_of(optimizer, group)
        yield
    finally:
        for group, params in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = params


def _spread(optimizer: torch.optim.Optimizer) -> None:
    """Have every parameter count as many steps as the one of its group that was asked."""
    there: list[torch.Tensor] = []
    now: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        for first in _first_of(optimizer, group):
            told = optimizer.state.get(first, {})
            for name, value in told.items():
                if type(value) is Pointer:
                    continue
                for state in _stepped(optimizer, group):
                    if state is told:
                        continue
                    if isinstance(value, torch.Tensor):
                        there.append(state[name])
                        now.append(value)
                    else:
                        state[name] = value
    if there:
        torch._foreach_copy_(there, now)


def _stepped(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The states of the parameters of a group that have a gradient."""
    for parameter in group["params"]:
        node = parameter.__dict__.get("_node")
        if node is not None and node.has_grad:
            state: dict[str, Any] = optimizer.state[parameter]
            yield state


def rates_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What an optimizer is set to: learning rates and their like."""
    return [
        {word: _plain(value) for word, value in group.items() if word != "params"}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    is_local = isinstance(value, torch.Tensor) and not isinstance(value, Pointer)
    return value.tolist() if is_local else value


def own_state(optimizers: Sequence[torch.optim.Optimizer]) -> list[Any]:
    """What optimizers keep here: settings, and counters of steps."""
    return [
        (
            rates_of(optimizer),
            [
                {
                    name: value._handle.id if type(value) is Pointer else _plain(value)
                    for name, value in state.items()
                }
                for state in optimizer.state.values()
            ],
        )
        for optimizer in optimizers
    ]


def set_own_state(optimizers: Sequence[torch.optim.Optimizer], kept: list[Any]) -> None:
    """Put back what :func:`own_state` told of counters."""
    for optimizer, (_, states) in zip(optimizers, kept, strict=True):
        for state, values in zip(optimizer.state.values(), states, strict=True):
            for name, value in values.items():
                there = state[name]
                if isinstance(there, torch.Tensor) and type(there) is not Pointer:
                    there.copy_(torch.tensor(value, dtype=there.dtype))
                elif type(there) is not Pointer:
                    state[name] = value
