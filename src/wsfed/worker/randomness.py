"""Random numbers of a session, equal to what local torch draws from the same seed.

torch's operations draw from one generator per process and device. A session keeps a state of its
own and lends it to that generator while an operation that draws runs; a lock keeps two sessions
from drawing at once. Operations that draw nothing (``Op.random`` is false) never come here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

__all__ = ["SessionRandom"]

_DRAWING: Final = threading.Lock()


class SessionRandom:
    """The state of one session's generator.

    Args:
        device: where the session's tensors are.
    """

    _state: torch.Tensor

    def __init__(self, device: torch.device) -> None:
        self._default = _default_generator(device)
        self._device = device
        self.seed(None)

    def seed(self, seed: int | None) -> None:
        """Begin anew, as ``torch.manual_seed(seed)`` does; without one as ``torch.seed()``."""
        own = torch.Generator(self._device)
        if seed is None:
            own.seed()
        else:
            own.manual_seed(seed)
        self._state = own.get_state()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """While this lasts, torch draws from this session's state."""
        with _DRAWING:
            owners = self._default.get_state()
            self._default.set_state(self._state)
            try:
                yield
            finally:
                self._state = self._default.get_state()
                self._default.set_state(owners)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = getattr(torch, device.type)
    generators = getattr(module, "default_generators", None)
    if generators:
        index = device.index if device.index is not None else module.current_device()
        return generators[index]  # type: ignore[no-any-return]
    return module._get_default_mps_generator()  # type: ignore[no-any-return]
