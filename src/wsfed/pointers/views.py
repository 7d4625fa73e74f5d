"""Tensors that share memory: what is written through one of them is in the graph of all.

torch keeps this at the memory; here the tensor that the memory belongs to, the *root*, counts the
writes that autograd has recorded, and each of its views looks whether it has seen them all. A view
holds the root's state, never the other way round, so that dropping either needs no collector.
The state is a pointer's ``__dict__``: ``torch.utils.swap_tensors`` takes it along.
"""

from __future__ import annotations

from typing import Any

from wsfed.pointers.autograd import Node
from wsfed.pointers.shapes import Meta, intern_meta

__all__ = ["check_write", "followed", "node_of", "share", "wrote"]


def share(view: dict[str, Any], base: dict[str, Any]) -> None:
    """``view`` is a view of ``base``, or of what that is a view of."""
    root = base.get("_view_of", base)
    view["_view_of"] = view["_odd"] = root
    view["_seen"] = root.get("_writes", 0)


def followed(view: dict[str, Any]) -> Meta | None:
    """The metadata of a view, after what was written into its root."""
    root, meta = view["_view_of"], view["_meta"]
    writes = root.get("_writes", 0)
    if view["_seen"] != writes:
        view["_seen"] = writes
        if root["_meta"].requires_grad and meta is not None:
            meta = view["_meta"] = _dependent(meta)
            view["_node"] = Node((node_of(root),))
    known: Meta | None = meta
    return known


def wrote(state: dict[str, Any]) -> None:
    """A write into this tensor was recorded; its own metadata and node tell of it already."""
    root = state.get("_view_of", state)
    writes = root["_writes"] = root.get("_writes", 0) + 1
    if root is state:
        return
    state["_seen"] = writes
    before = (node_of(root),) if root["_meta"].requires_grad else ()
    root["_node"] = Node((*before, state["_node"]))
    root["_meta"] = _dependent(root["_meta"])


def check_write(state: dict[str, Any]) -> None:
    """Whether autograd records a write into this tensor; what torch itself does not see here.

    Raises:
        RuntimeError: torch's, for a view of a leaf.
    """
    root = state.get("_view_of")
    if root is None:
        return
    meta: Meta = root["_meta"]
    if meta.requires_grad and meta.is_leaf:
        raise RuntimeError(
            "a view of a leaf Variable that requires grad is being used in an in-place operation."
        )


def node_of(state: dict[str, Any]) -> Node:
    """The node of a tensor that requires grad; a leaf gets one when it is first needed."""
    node: Node | None = state.get("_node")
    if node is None:
        node = state["_node"] = Node()
    return node


def _dependent(meta: Meta) -> Meta:
    return intern_meta(meta.shape, meta.stride, meta.dtype, True, False)
