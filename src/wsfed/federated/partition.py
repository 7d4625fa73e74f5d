"""Who holds which rows: one data set cut into the parts of several sites.

Every function gives index arrays, for ``data[index]`` or ``torch.utils.data.Subset``. Each row is
in exactly one of them. The same seed gives the same parts. Rows stand in random order within a
part, except for :func:`by_id`, which draws nothing.

=====================  =========================================================
:func:`iid`            sites are alike
:func:`dirichlet`      sites differ in their labels, more so for a smaller alpha
:func:`shards`         a site has a few labels only
:func:`quantity_skew`  sites differ in size alone
:func:`by_id`          the data say whose a row is
=====================  =========================================================
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Index", "by_id", "dirichlet", "iid", "quantity_skew", "shards"]

Index: TypeAlias = npt.NDArray[np.int64]
"""Row numbers, int64 [rows of the part]."""

# Draws before a partition is given up. One is cheap (0.2 ms for 10 classes and 100 sites), and
# what happens less than once in a thousand draws is hardly a sample of the law that was asked for.
TRIES = 1000

# Near the largest float, numpy's draws overflow and all shares are 0. Far below it they are equal.
MOST_ALPHA = 1e100


def iid(rows: int, sites: int, *, seed: int) -> list[Index]:
    """Deal rows at random into parts whose sizes differ by one at most.

    Args:
        rows: of the data set.
        sites: parts to make.
        seed: of the draw.

    Raises:
        ValueError: fewer rows than sites, or fewer sites than one.
    """
    _check_sites(rows, sites)
    order = np.random.default_rng(seed).permutation(rows).astype(np.int64)
    return list(np.array_split(order, sites))


def dirichlet(
    labels: npt.ArrayLike, sites: int, *, alpha: float, seed: int, min_rows: int = 1
) -> list[Index]:
    """Skew the labels: how a class is shared out over the sites is drawn from Dirichlet(alpha).

    The idea is that of Hsu et al. 2019 (arXiv:1909.06335), who draw the classes of each site; this
    is the form of Yurochkin et al. 2019 (arXiv:1905.12022), who draw the sites of each class, so
    that every row is dealt once. Sizes of the sites differ too, therefore.

    Args:
        labels: [rows], of any kind that can be sorted.
        sites: parts to make.
        alpha: near 0, a class is at one site; large, all sites are alike. Common: 0.1 to 1.
        seed: of the draw.
        min_rows: the draw is repeated until every site has as many.

    Raises:
        ValueError: labels that are empty, missing or not one-dimensional, fewer rows than sites
            or than ``sites * min_rows``, an alpha out of range, or no draw that gave every site
            its ``min_rows``.
    """
    _, classes, counts = np.unique(
        _column(labels, "labels"), return_inverse=True, return_counts=True
    )
    return _skewed(classes, counts, sites, alpha, seed, min_rows)


def shards(labels: npt.ArrayLike, sites: int, *, per_site: int = 2, seed: int) -> list[Index]:
    """Sort rows by label, cut them into shards, give each site a few of them at random.

    This is the pathological non-IID split of McMahan et al. 2017 (arXiv:1602.05629, section 3):
    with two shards, most sites see two labels.

    Args:
        labels: [rows], of any kind that can be sorted.
        sites: parts to make.
        per_site: shards of a site. Sizes of shards differ by one at most.
        seed: of the draw.

    Raises:
        ValueError: labels that are empty, missing or not one-dimensional, fewer sites or shards
            than one, or fewer rows than shards.
    """
    column = _column(labels, "labels")
    _check_sites(column.size, sites)
    if per_site < 1 or sites * per_site > column.size:
        raise ValueError(
            f"{column.size} rows do not make {per_site} shards for each of {sites} sites"
        )
    rng = np.random.default_rng(seed)
    by_label = np.argsort(column, kind="stable").astype(np.int64)
    pieces = np.array_split(by_label, sites * per_site)
    deal = rng.permutation(sites * per_site).reshape(sites, per_site)
    return [rng.permutation(np.concatenate([pieces[i] for i in hand])) for hand in deal]


def quantity_skew(
    rows: int, sites: int, *, alpha: float, seed: int, min_rows: int = 1
) -> list[Index]:
    """Skew the sizes alone: rows are dealt at random, the share of a site is from Dirichlet(alpha).

    Li et al. 2022 (arXiv:2102.02079) call this quantity skew.

    Args:
        rows: of the data set.
        sites: parts to make.
        alpha: near 0, one site has nearly all; large, sizes are equal.
        seed: of the draw.
        min_rows: the draw is repeated until every site has as many.

    Raises:
        ValueError: fewer rows than sites or than ``sites * min_rows``, an alpha out of range, or
            no draw that gave every site its ``min_rows``.
    """
    _check_sites(rows, sites)
    one_class = np.zeros(rows, np.int64)
    return _skewed(one_class, np.array([rows]), sites, alpha, seed, min_rows)


def by_id(ids: npt.ArrayLike) -> dict[Any, Index]:
    """The natural partition: rows of the same writer, patient or device belong together.

    Args:
        ids: [rows], of any kind that can be sorted.

    Returns:
        The rows of each id, ascending. Ids are plain Python values, in sorted order.

    Raises:
        ValueError: ids that are empty, missing or not one-dimensional.
    """
    names, owners, counts = np.unique(_column(ids, "ids"), return_inverse=True, return_counts=True)
    order = np.argsort(owners, kind="stable").astype(np.int64)
    parts = np.split(order, np.cumsum(counts)[:-1])
    return dict(zip(names.tolist(), parts, strict=True))


def _skewed(
    classes: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    sites: int,
    alpha: float,
    seed: int,
    min_rows: int,
) -> list[Index]:
    """Deal the rows of each class over the sites.

    Args:
        classes: number of each row's class, [rows].
        counts: rows of each class, [classes].
        sites, alpha, seed, min_rows: as :func:`dirichlet` has them.
    """
    _check_skew(classes.size, sites, alpha, min_rows)
    rng = np.random.default_rng(seed)
    sizes = _draw_sizes(rng, counts, sites, alpha, min_rows)
    order = rng.permutation(classes.size).astype(np.int64)
    order = order[np.argsort(classes[order], kind="stable")]  # class after class, each shuffled
    cells = np.split(order, np.cumsum(sizes)[:-1])  # of class 0: site 0, site 1, …; of class 1: …
    return [rng.permutation(np.concatenate(cells[site::sites])) for site in range(sites)]


def _draw_sizes(
    rng: np.random.Generator, counts: npt.NDArray[Any], sites: int, alpha: float, min_rows: int
) -> Index:
    """Rows of each class at each site, [classes, sites].

    Shares become whole numbers by systematic rounding: all cuts of a class are moved by the same
    random part of a row and rounded down. So a cell has its share of rows on average, and is never
    off by one or more. (Rounding to the nearest would give a class of one row to a middle site.)
    """
    totals = counts[:, np.newaxis]
    for _ in range(TRIES):
        shares = rng.dirichlet(np.full(sites, alpha), size=len(counts))
        cuts = np.floor(np.cumsum(shares, axis=1) * totals + rng.random(totals.shape))
        cuts[:, -1:] = totals  # the sum of shares is 1 but for rounding
        sizes: Index = np.diff(np.minimum(cuts, totals), axis=1, prepend=0).astype(np.int64)
        if sizes.sum(axis=0).min() >= min_rows:
            return sizes
    raise ValueError(
        f"none of {TRIES} draws with alpha {alpha} gave each of {sites} sites {min_rows} of "
        f"{counts.sum()} rows: take a larger alpha, fewer sites or a smaller min_rows"
    )


def _column(values: npt.ArrayLike, noun: str) -> npt.NDArray[Any]:
    """Values as a one-dimensional array without gaps."""
    column = np.asarray(values)
    if column.ndim != 1 or not column.size:
        raise ValueError(f"{noun} are a list of 1 or more, not of shape {list(column.shape)}")
    for row, value in enumerate(column.tolist()):
        if value is None or value != value:  # None, NaN, NaT: a gap is not a site or a class
            raise ValueError(f"{noun}: row {row} of {column.size} has none ({value})")
    return column


def _check_sites(rows: int, sites: int) -> None:
    if not 1 <= sites <= rows:
        raise ValueError(f"{rows} rows do not make parts for {sites} sites")


def _check_skew(rows: int, sites: int, alpha: float, min_rows: int) -> None:
    _check_sites(rows, sites)
    if not 0 < alpha <= MOST_ALPHA:
        raise ValueError(f"alpha is above 0 and at most {MOST_ALPHA}, not {alpha}")
    if not 0 <= sites * min_rows <= rows:
        raise ValueError(f"{rows} rows do not make {min_rows} rows for each of {sites} sites")
