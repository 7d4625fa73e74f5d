"""The modes of one session: gradients, autocast, and a look-out for values that are no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.graph import Node

from wsfed.errors import OpNotAllowed
from wsfed.protocol import modes

__all__ = ["Modes", "watched"]


class Modes:
    """What the commands of a session run in.

    A region of autocast lasts as long as commands ask for it, so that a weight is converted once
    in it, as in the client's own ``with`` block. All of this belongs to the thread of the session.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._region = 0
        self._autocast = contextlib.ExitStack()

    @property
    def in_region(self) -> bool:
        """Whether a region of autocast lasts."""
        return self._region != 0

    @contextlib.contextmanager
    def entered(self, mode: int) -> Iterator[None]:
        """Run one command in its modes."""
        if mode & modes.AUTOCAST != self._region:
            self._change(mode & modes.AUTOCAST)
        if mode & modes.INFERENCE:
            with torch.inference_mode():
                yield
        elif mode & modes.NO_GRAD:
            with torch.no_grad():
                yield
        else:
            yield

    def _change(self, region: int) -> None:
        if region == modes.AUTOCAST:
            raise OpNotAllowed("autocast is to one dtype at a time")
        self._autocast.close()
        self._region = 0
        if region:
            dtype = torch.bfloat16 if region == modes.AUTOCAST_BFLOAT16 else torch.float16
            self._autocast.enter_context(torch.autocast(self._device.type, dtype=dtype))
        self._region = region


@contextlib.contextmanager
def watched(mode: int, roots: Sequence[torch.Tensor]) -> Iterator[None]:
    """Where a mode asks for it, see that no step of a backward pass gives what is no number.

    torch's own anomaly mode is a setting of the process, which other sessions share.

    Raises:
        RuntimeError: torch's own text, naming the step.
    """
    if not mode & modes.ANOMALY:
        yield
        return
    handles = [_watch(node) for node in _nodes(roots)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(node: Node) -> Any:
    def check(given: Sequence[torch.Tensor | None], _: Any) -> None:
        for place, gradient in enumerate(given):
            if gradient is not None and bool(gradient.isnan().any()):
                raise RuntimeError(
                    f"Function '{node.name()}' returned nan values in its {place}th output."
                )

    return node.register_hook(check)


def _nodes(roots: Sequence[torch.Tensor]) -> Iterator[Node]:
    seen: set[Node] = set()
    pending = [root.grad_fn for root in roots]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions)
            if not hasattr(node, "variable"):  # what adds to a leaf returns nothing
                yield node
