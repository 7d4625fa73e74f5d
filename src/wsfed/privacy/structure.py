"""What a member can tell of a model by the values that it was given: structure, and rows alike.

It was given dtypes, shapes and values, in an order; neither names nor the code that computes with
them. So a structure that is pinned keeps out other layers, and not another loss.

An *imprint* layer (Fowl et al. 2022, *Robbing the fed*) measures the same thing in each of its
neurons and lets each fire from another value on: the difference of two neighbours' gradients is the
row whose measurement is between them, in the sum over everybody's rows, too. The weights of its
neurons are alike. Rows that were made less alike measure less the same, and restore less.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Final

import torch

from wsfed.privacy.noise import unforeseeable
from wsfed.tensors import DTYPE_NAMES

__all__ = ["ALIKE", "check_rows", "check_structure", "share_alike", "structure_of"]

#: Rows whose cosine is above this are alike. In eight dimensions one pair of three millions drawn
#: at random is, in 784 none.
ALIKE: Final = 0.99
#: Shorter rows are alike by chance.
_LEAST_WIDTH: Final = 8
#: Rows that are compared with each other, drawn anew each time: 2 ms for rows of 1,000.
_COMPARED: Final = 256


def structure_of(values: Sequence[torch.Tensor]) -> str:
    """SHA-256 of dtypes and shapes in their order, in hexadecimal digits.

    Args:
        values: of a model: parameters and buffers, as in its ``state_dict()``.
    """
    told = [[DTYPE_NAMES[value.dtype], list(value.shape)] for value in values]
    return hashlib.sha256(json.dumps(told, separators=(",", ":")).encode()).hexdigest()


def check_structure(pinned: str, given: Sequence[torch.Tensor]) -> None:
    """Whether a model has the structure that is agreed.

    Args:
        pinned: of :func:`structure_of`; empty where nothing is agreed.
        given: the model's values.

    Raises:
        ValueError: it has another one.
    """
    if pinned and (found := structure_of(given)) != pinned:
        raise ValueError(
            f"the model has another structure than the roster's: {len(given)} values, "
            f"{found[:16]}… instead of {pinned[:16]}…"
        )


def check_rows(given: Sequence[torch.Tensor], most: float) -> None:
    """Whether no layer of a model could single out rows of data by neurons that are alike.

    Args:
        given: the model's values.
        most: share of the rows, or columns, of one value that may be like another one.

    Raises:
        ValueError: a layer has more.
    """
    for place, value in enumerate(given):
        if value.ndim < 2 or not value.is_floating_point() or not value.numel():
            continue
        flat = value.detach().flatten(1)
        for kind, rows in (("rows", flat), ("columns", flat.T if value.ndim == 2 else flat[:0])):
            if (share := share_alike(rows)) > most:
                raise ValueError(
                    f"of value {place} of the model, {list(value.shape)}, {share:.0%} of the "
                    f"{kind} are alike, where {most:.0%} are allowed: such a layer can single out "
                    "rows of data in a sum"
                )


def share_alike(rows: torch.Tensor) -> float:
    """Share of the rows whose direction, or the opposite one, another row has.

    Args:
        rows: two dimensions. Of many a sample is looked at; none that are zero.
    """
    count = len(rows)
    if count < 2 or rows.shape[1] < _LEAST_WIDTH:
        return 0.0
    if count > _COMPARED:
        drawn = unforeseeable().choice(count, _COMPARED, replace=False)
        rows = rows[torch.from_numpy(drawn).to(rows.device)]
    rows = rows.float()
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)
    cosines = (rows @ rows.T).abs_()
    cosines.fill_diagonal_(0.0)
    return float((cosines > ALIKE).any(dim=1).float().mean())
