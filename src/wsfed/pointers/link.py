"""The seam between pointers and the session that carries their commands."""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import torch

from wsfed.pointers.shapes import Meta
from wsfed.pointers.site import Site

__all__ = ["Link", "link_of"]

_T = TypeVar("_T")


class Link(Protocol):
    """A session as pointers see it. Everything is ordered; nothing here waits but ``settle``.

    Attributes:
        worker: what ``Pointer.location`` gives; has an ``id``.
        device: where the worker computes.
        recordings: that hold back what is released while they last.
        plans: what was shipped, by the hash of the program.
    """

    worker: Any
    device: torch.device
    recordings: list[Any]
    plans: weakref.WeakValueDictionary[str, Any]

    @property
    def closed(self) -> bool:
        """The session is over."""

    @property
    def blocking(self) -> bool:
        """Whether ``settle`` and ``run`` return results instead of awaitables, called here."""

    def new_id(self) -> int:
        """An identifier that the session has not used."""

    def issue(self, command: list[Any], site: Site | None = None) -> None:
        """Queue a command in wire form."""

    def store(
        self,
        id: int,
        tensor: torch.Tensor,
        requires_grad: bool,
        site: Site | None = None,
        *,
        lasting: bool = False,
        sealed: bool = False,
    ) -> None:
        """Queue a tensor, as it is now, to be kept under ``id``; one that lasts is not copied."""

    def define(self, plan: int, packed: bytes, site: Site | None = None) -> None:
        """Queue a recorded program, to be kept under ``plan``."""

    def release(self, id: int, nbytes: int = 0) -> None:
        """Nobody holds this object, of about this size, any more. From any thread; never raises."""

    def fetch(
        self, id: int, site: Site | None = None, meta: Meta | None = None
    ) -> Awaitable[torch.Tensor]:
        """Ask for a value; the request leaves at once. What comes has to fit ``meta``."""

    def ask(
        self,
        make: Callable[[int], list[Any]],
        site: Site | None = None,
        *,
        tensor: torch.Tensor | None = None,
    ) -> Awaitable[Any]:
        """Queue a request; ``make`` gives the command for its number, a tensor goes along."""

    def transfer(self, ids: Sequence[int], to: Link, new_ids: Sequence[int]) -> None:
        """Copy objects to another worker; later commands there wait for them."""

    def settle(self, asked: Awaitable[_T]) -> Any:
        """An awaitable as it is, or in the blocking world its result."""

    def run(self, work: Coroutine[Any, Any, _T]) -> Any:
        """Start ``work``: an awaitable, or in the blocking world its result."""


def link_of(worker: Any) -> Link:
    """The session behind a worker's handle.

    Raises:
        TypeError: not a worker.
    """
    link = getattr(worker, "link", None)
    if link is None:
        advice = "; await it first" if hasattr(worker, "__await__") else ""
        raise TypeError(f"a worker is needed here, not {type(worker).__name__}{advice}")
    found: Link = link
    return found
