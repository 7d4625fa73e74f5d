"""What may leave a worker: the owner's rules, not the client's.

Every object carries the names of the private data sets whose *rows* it holds. The names follow
views, copies, indexing, conversions and element-wise operations (``Op.carries_rows``), losses that
are not reduced to one number, and writes into other tensors; a labelled object is not for fetching
or moving. What is *computed over* rows (a reduction, a layer's output, a gradient) carries no label
yet: the limits are in the README.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import torch

from wsfed.errors import GetNotPermitted
from wsfed.ops.table import Op

__all__ = ["CANNED", "NO_LABELS", "Labels", "canned", "check_leaving", "holds_rows"]

#: Names of the private data sets whose rows an object holds.
Labels: TypeAlias = frozenset[str]
NO_LABELS: Final[Labels] = frozenset()

#: Instead of an error's own text, which may quote values.
CANNED: Final = "the operation failed on private data, so its message stays on the worker"


def canned(error: Exception, name: str) -> str:
    """What an error on private data says: its kind, and where that is certain, the usual cause."""
    if isinstance(error, IndexError) and name.rsplit(".", 1)[-1] in _OF_CLASSES:
        return f"{CANNED}; a label is no class of what the model gives, or negative"
    return CANNED


#: Where an index is a class.
_OF_CLASSES: Final = frozenset({"cross_entropy", "nll_loss", "linear_cross_entropy"})


def holds_rows(op: Op, result: Any) -> bool:
    """Whether an operation's result holds rows of its arguments.

    A loss says so by its result: with ``reduction="none"``, or ``reduce=False``, in whatever place
    it was given, there is a number for each row or element.
    """
    word = op.name.rsplit(".", 1)[-1]
    is_loss = word.endswith("_loss") or word in _LOSSES
    return op.carries_rows or (is_loss and isinstance(result, torch.Tensor) and result.ndim > 0)


#: Losses whose names do not end with the word.
_LOSSES: Final = frozenset(
    [
        "cross_entropy",
        "linear_cross_entropy",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "kl_div",
    ]
)


def check_leaving(labels: Labels, what: str) -> None:
    """Whether an object may leave the worker.

    Raises:
        GetNotPermitted: it holds rows of a private data set.
    """
    if labels:
        names = ", ".join(sorted(repr(name) for name in labels))
        raise GetNotPermitted(f"it holds rows of the private data set {names}", op=what)
