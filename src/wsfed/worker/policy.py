"""What may leave a worker: the owner's rules, not the client's.

Every object carries the names of the private data sets whose *rows* it holds. The names follow
views, copies, indexing, conversions and element-wise operations (``Op.carries_rows``), and writes
into other tensors; a labelled object is not for fetching or moving. What is *computed over* rows
(a reduction, a layer's output, a gradient) carries no label yet: the limits are in the README.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from wsfed.errors import GetNotPermitted

__all__ = ["CANNED", "NO_LABELS", "Labels", "check_leaving"]

#: Names of the private data sets whose rows an object holds.
Labels: TypeAlias = frozenset[str]
NO_LABELS: Final[Labels] = frozenset()

#: Instead of an error's own text, which may quote values.
CANNED: Final = "the operation failed on private data, so its message stays on the worker"


def check_leaving(labels: Labels, what: str) -> None:
    """Whether an object may leave the worker.

    Raises:
        GetNotPermitted: it holds rows of a private data set.
    """
    if labels:
        names = ", ".join(sorted(repr(name) for name in labels))
        raise GetNotPermitted(f"it holds rows of the private data set {names}", op=what)
