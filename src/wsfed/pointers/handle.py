"""The remote object behind a pointer, freed when the last pointer to it goes."""

from __future__ import annotations

from wsfed.pointers.link import Link

__all__ = ["Handle"]


class Handle:
    """An identifier on a link, and how much memory is there, as far as is known.

    A pointer has a handle rather than a finaliser: a weak reference to a tensor would keep
    ``torch.utils.swap_tensors`` from exchanging it.
    """

    __slots__ = ("id", "link", "nbytes")

    def __init__(self, link: Link, id: int, nbytes: int = 0) -> None:
        self.link = link
        self.id = id
        self.nbytes = nbytes

    def __del__(self) -> None:
        self.link.release(self.id, self.nbytes)
