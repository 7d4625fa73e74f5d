"""What the client remembers of the worker's autograd graph: who depends on which leaf.

It is enough to answer ``requires_grad``, ``is_leaf`` and ``grad is None`` without asking. A pointer
that requires grad has a :class:`Node`; the parents of a result's node are those of the arguments;
``backward`` goes through them and marks the leaves that have a gradient then.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Node", "mark"]


class Node:
    """A place in the graph.

    Attributes:
        parents: nodes of the arguments that require grad; empty for a leaf.
        has_grad: a backward pass has reached this leaf (or one that retains its gradient).
        retains: a non-leaf that keeps its gradient.
        generation: counts the times the worker has replaced the gradient by a new tensor.
        grad_parents: what the gradient itself depends on, where it is part of a graph.
        is_guess: it stands for a gradient, of which only the worker knows on what it depends.
        is_sure: the worker has a gradient for certain, not only if the guess is right.
    """

    __slots__ = (
        *("generation", "grad_parents", "has_grad", "is_guess", "is_sure", "parents", "retains"),
    )

    def __init__(self, parents: tuple[Node, ...] = (), *, is_guess: bool = False) -> None:
        self.parents = parents
        self.is_guess = is_guess
        self.is_sure = True
        self.has_grad = False
        self.retains = False
        self.generation = 0
        self.grad_parents: tuple[Node, ...] = ()

    def __repr__(self) -> str:
        return f"<remote graph node with {len(self.parents)} parents>"


def mark(roots: Iterable[Node], *, only: set[Node] | None, create_graph: bool) -> set[Node]:
    """A backward pass ran from ``roots``; gives the nodes that have a gradient by it.

    Args:
        roots: nodes of the tensors it started from.
        only: the leaves it was restricted to, if it was.
        create_graph: gradients were added to by a new tensor instead of in place.
    """
    begun = tuple(roots)
    seen: set[Node] = set()
    guessed: list[Node] = []
    marked: set[Node] = set()
    for is_sure, pending in ((True, list(begun)), (False, guessed)):
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if _keeps(node, only):
                if create_graph:
                    node.generation += node.has_grad
                    node.grad_parents += begun
                node.is_sure = is_sure or (node.has_grad and node.is_sure)
                node.has_grad = True
                marked.add(node)
            (guessed if node.is_guess else pending).extend(node.parents)
    return marked


def _keeps(node: Node, only: set[Node] | None) -> bool:
    """Whether a gradient is left here. What ``inputs=`` names may be no leaf."""
    if only is None:
        return not node.parents or node.retains
    return node in only or (node.retains and _leads_to(node, only))


def _leads_to(node: Node, wanted: set[Node]) -> bool:
    """Whether the way to one of them goes through ``node``."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each in wanted:
            return True
        if each not in seen:
            seen.add(each)
            pending.extend(each.parents)
    return False
