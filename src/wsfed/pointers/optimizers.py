"""An optimizer's state follows its parameters from worker to worker.

torch's own optimizers run here; their arithmetic is ordinary torch and so runs where the
parameters are. What is left to do is to take momentum and the like along when the parameters have
moved: a hook before each step does it (``torch.optim.optimizer.register_optimizer_step_pre_hook``).
It is there while there is a worker; importing wsfed installs nothing.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wsfed.errors import PointerError
from wsfed.pointers.link import Link
from wsfed.pointers.pointer import Pointer, make_sent, transfer
from wsfed.pointers.recording import unrecorded

__all__ = ["install", "uninstall"]


#: A parameter's state, a name in it, and the pointer there.
_Place: TypeAlias = tuple[dict[str, Any], str, Pointer]


class _Hook:
    """Installed while it has users."""

    def __init__(self) -> None:
        self.users = 0
        self.handle: Any = None


_hook = _Hook()


def install() -> None:
    """One worker more."""
    _hook.users += 1
    if _hook.handle is None:
        _hook.handle = register_optimizer_step_pre_hook(_before_step)


def uninstall() -> None:
    """One worker less; the last one takes the hook away."""
    _hook.users -= 1
    if _hook.users == 0 and _hook.handle is not None:
        _hook.handle.remove()
        _hook.handle = None


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    with unrecorded():  # a plan begins with the state where it is needed
        _follow(optimizer)


def _follow(optimizer: torch.optim.Optimizer) -> None:
    away: dict[Link, list[_Place]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            link = parameter._handle.link if isinstance(parameter, Pointer) else None
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Pointer) and value._handle.link is not link:
                    away.setdefault(_needed(link), []).append((state, name, value))
                elif isinstance(value, torch.Tensor) and not isinstance(value, Pointer):
                    state[name] = _sent(link, value)
    for to, places in away.items():
        for place, moved in zip(places, transfer([each[2] for each in places], to), strict=True):
            place[0][place[1]] = moved


def _needed(link: Link | None) -> Link:
    if link is None:
        raise PointerError(
            "the parameters are here and the optimizer's state is on a worker: "
            "bring it home, too, with `await wsfed.get(optimizer)`"
        )
    return link


def _sent(link: Link | None, value: torch.Tensor) -> torch.Tensor:
    if link is None or value.ndim == 0:  # a counter of steps, which torch keeps on the host
        return value
    return make_sent(link, value)
