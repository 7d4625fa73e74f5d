"""The remote object behind a pointer, freed when the last pointer to it goes."""

from __future__ import annotations

from wsfed.pointers.link import Link

__all__ = ["Handle"]


class Handle:
    """An identifier on a link.

    A pointer has a handle rather than a finaliser: a weak reference to a tensor would keep
    ``torch.utils.swap_tensors`` from exchanging it.
    """

    __slots__ = ("id", "link")

    def __init__(self, link: Link, id: int) -> None:
        self.link = link
        self.id = id

    def __del__(self) -> None:
        self.link.release(self.id)
