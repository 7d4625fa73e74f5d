"""An optimizer's state follows its parameters from worker to worker.

torch's own optimizers run here; their arithmetic is ordinary torch and so runs where the
parameters are. What is left to do is to take momentum and the like along when the parameters have
moved: a hook before each step does it (``torch.optim.optimizer.register_optimizer_step_pre_hook``).
It is there while there is a worker; importing wsfed installs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wsfed.errors import PointerError
from wsfed.pointers.link import Link
from wsfed.pointers.pointer import Pointer, make_sent

__all__ = ["install", "uninstall"]


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
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                _follow(parameter, state)


def _follow(parameter: torch.Tensor, state: dict[str, Any]) -> None:
    link = parameter._handle.link if isinstance(parameter, Pointer) else None
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            state[name] = _at(link, value)


def _at(link: Link | None, value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, Pointer):
        if link is None:
            raise PointerError(
                "the parameters are here and the optimizer's state is on a worker: "
                "bring it home, too, with `await wsfed.get(optimizer)`"
            )
        return value if value._handle.link is link else value._transfer(link)
    if link is None or value.ndim == 0:  # a counter of steps, which torch keeps on the host
        return value
    return make_sent(link, value)
