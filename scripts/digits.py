"""scikit-learn's handwritten digits (1,797 images of 8 x 8), cut into parts for workers.

The held-out rows and the parts depend on nothing but the arguments, so that a run can be repeated
and compared with training on all rows in one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

#: One row in five is held out for testing.
TEST_FRACTION = 0.2


@dataclass(frozen=True, slots=True)
class Rows:
    """``images`` float32 of n x 1 x 8 x 8 in 0 to 1, ``labels`` int64 of n."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: NDArray[np.int64]) -> Rows:
        """The rows at ``index``."""
        return Rows(self.images[index], self.labels[index])

    def save(self, path: Path) -> None:
        """Write an ``.npz`` that a worker can load."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=self.images, labels=self.labels)

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Read what :meth:`save` wrote.

        Raises:
            KeyError: an array is missing.
            OSError: there is no such file, or it cannot be read.
            ValueError: it is no ``.npz``.
        """
        with np.load(path, allow_pickle=False) as file:
            return cls(file["images"], file["labels"])


def load(seed: int = 0) -> tuple[Rows, Rows]:
    """Training rows and held-out rows."""
    bunch = load_digits()
    rows = Rows((bunch.images / 16.0).astype(np.float32)[:, None], bunch.target.astype(np.int64))
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = round(len(rows) * TEST_FRACTION)
    return rows.take(order[held_out:]), rows.take(order[:held_out])


def split(rows: Rows, parts: int, how: str) -> list[Rows]:
    """Cut training rows into parts of about equal size.

    Args:
        rows: what :func:`load` gives (their order is random already).
        parts: how many.
        how: ``"iid"``, or ``"label"``: sorted by digit, so that a worker sees only a few of them.
    """
    if not 1 <= parts <= len(rows):
        raise ValueError(f"{len(rows)} rows make 1 to {len(rows)} parts, not {parts}")
    if how not in ("iid", "label"):
        raise ValueError(f"rows are split 'iid' or by 'label', not {how!r}")
    order = np.arange(len(rows)) if how == "iid" else np.argsort(rows.labels, kind="stable")
    return [rows.take(index) for index in np.array_split(order, parts)]
