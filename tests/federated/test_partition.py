"""Every row is in exactly one part, and the parts are skewed as they should be."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsfed.federated import partition
from wsfed.federated.partition import Index, by_id, dirichlet, iid, quantity_skew, shards

LABELS = np.random.default_rng(0).integers(0, 10, 2000)

alphas = st.floats(0.01, 1000)
seeds = st.integers(0, 2**40)


@st.composite
def labels_and_sites(draw: st.DrawFn) -> tuple[list[int], int]:
    labels = draw(st.lists(st.integers(0, 5), min_size=1, max_size=80))
    return labels, draw(st.integers(1, len(labels)))


def check(parts: Iterable[Index], rows: int) -> None:
    """Parts are index arrays, disjoint and complete."""
    parts = list(parts)
    assert all(part.dtype == np.int64 and part.ndim == 1 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))


def sizes(parts: Iterable[Index]) -> list[int]:
    return [len(part) for part in parts]


def label_skew(parts: list[Index]) -> float:
    """Mean distance in total variation between labels of a part and of all, 0 to 1."""
    everyone = np.bincount(LABELS, minlength=10) / len(LABELS)
    mixes = [np.bincount(LABELS[part], minlength=10) / len(part) for part in parts]
    return float(np.mean([np.abs(mix - everyone).sum() / 2 for mix in mixes]))


# every row in exactly one part


@settings(deadline=None)
@given(labels_and_sites(), seeds)
def test_iid_parts_are_complete_and_even(case: tuple[list[int], int], seed: int) -> None:
    labels, sites = case
    parts = iid(len(labels), sites, seed=seed)
    check(parts, len(labels))
    assert len(parts) == sites and max(sizes(parts)) - min(sizes(parts)) <= 1


@settings(deadline=None)
@given(labels_and_sites(), alphas, seeds)
def test_dirichlet_parts_are_complete(case: tuple[list[int], int], alpha: float, seed: int) -> None:
    labels, sites = case
    parts = dirichlet(labels, sites, alpha=alpha, seed=seed, min_rows=0)
    assert len(parts) == sites
    check(parts, len(labels))


@settings(deadline=None)
@given(labels_and_sites(), alphas, seeds)
def test_quantity_skewed_parts_are_complete(
    case: tuple[list[int], int], alpha: float, seed: int
) -> None:
    labels, sites = case
    parts = quantity_skew(len(labels), sites, alpha=alpha, seed=seed, min_rows=0)
    assert len(parts) == sites
    check(parts, len(labels))


@settings(deadline=None)
@given(labels_and_sites(), st.integers(1, 4), seeds)
def test_parts_of_shards_are_complete_and_about_even(
    case: tuple[list[int], int], per_site: int, seed: int
) -> None:
    labels, sites = case
    labels = labels * per_site
    parts = shards(labels, sites, per_site=per_site, seed=seed)
    check(parts, len(labels))
    assert len(parts) == sites and max(sizes(parts)) - min(sizes(parts)) <= per_site


@given(st.lists(st.text("abc", max_size=3), min_size=1, max_size=60))
def test_rows_of_an_id_are_together_and_in_order(ids: list[str]) -> None:
    parts = by_id(ids)
    check(parts.values(), len(ids))
    assert list(parts) == sorted(set(ids))
    for name, part in parts.items():
        assert part.tolist() == [row for row, other in enumerate(ids) if other == name]


# the seed


MAKERS: list[Callable[[int], list[Index]]] = [
    lambda seed: iid(2000, 10, seed=seed),
    lambda seed: dirichlet(LABELS, 10, alpha=0.5, seed=seed),
    lambda seed: shards(LABELS, 10, seed=seed),
    lambda seed: quantity_skew(2000, 10, alpha=0.5, seed=seed),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_seed_gives_the_same_parts_and_another_seed_others(
    make: Callable[[int], list[Index]],
) -> None:
    first, again, other = make(3), make(3), make(4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("make", MAKERS)
def test_rows_of_a_part_are_shuffled(make: Callable[[int], list[Index]]) -> None:
    part = max(make(0), key=len)
    assert 0.35 < np.mean(np.diff(part) > 0) < 0.65
    assert np.mean(np.diff(LABELS[part]) != 0) > 0.5  # not class after class either


# skew


def test_a_smaller_alpha_skews_labels_more() -> None:
    skews = [
        label_skew(dirichlet(LABELS, 10, alpha=alpha, seed=1)) for alpha in (0.1, 1.0, 10.0, 1e6)
    ]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.5 and skews[-1] < 0.01 < label_skew(iid(2000, 10, seed=1))


def test_a_smaller_alpha_skews_sizes_more_but_not_labels() -> None:
    few, many = (quantity_skew(2000, 5, alpha=alpha, seed=1) for alpha in (0.5, 100))
    assert np.std(sizes(few)) > 3 * np.std(sizes(many))
    assert label_skew(many) < 0.1


@pytest.mark.parametrize("alpha", [1e-320, 1e-9])
def test_a_tiny_alpha_leaves_a_class_at_one_site(alpha: float) -> None:
    parts = dirichlet(LABELS, 3, alpha=alpha, seed=0)
    for label in range(10):
        assert sum(label in LABELS[part] for part in parts) == 1


def test_a_huge_alpha_makes_equal_parts() -> None:
    assert sizes(quantity_skew(2000, 8, alpha=1e100, seed=0)) == [250] * 8


def test_shares_follow_the_dirichlet_law() -> None:
    draws = [
        sizes(quantity_skew(1000, 4, alpha=2.0, seed=seed, min_rows=0)) for seed in range(2000)
    ]
    shares = np.array(draws) / 1000
    assert np.allclose(shares.mean(0), 1 / 4, atol=0.015)
    assert np.allclose(shares.var(0), (1 / 4) * (3 / 4) / (4 * 2.0 + 1), rtol=0.15)


def test_classes_of_one_row_do_not_favour_a_site() -> None:
    counts = np.array(sizes(dirichlet(np.arange(4000), 4, alpha=100.0, seed=0)))
    assert np.all(np.abs(counts - 1000) < 100)


def test_a_draw_is_repeated_until_every_site_has_enough() -> None:
    assert min(sizes(dirichlet(LABELS, 10, alpha=0.1, seed=5, min_rows=0))) < 40
    assert min(sizes(dirichlet(LABELS, 10, alpha=0.1, seed=5, min_rows=40))) >= 40
    assert min(sizes(quantity_skew(2000, 10, alpha=0.5, seed=5, min_rows=20))) >= 20


def test_two_shards_are_few_labels() -> None:
    labels = np.repeat(np.arange(10), 60)[np.random.default_rng(1).permutation(600)]
    for part in shards(labels, 10, seed=0):
        assert len(part) == 60 and len(set(labels[part])) <= 2


def test_shards_of_one_label_are_cut_in_the_order_of_rows() -> None:
    parts = shards(np.zeros(12), 3, per_site=1, seed=0)
    assert sorted(sorted(part.tolist()) for part in parts) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


# kinds of labels and ids


def test_labels_may_be_words() -> None:
    check(dirichlet(["cat", "dog", "cat", "eel"] * 5, 2, alpha=10, seed=0), 20)
    check(shards(["cat", "dog", "cat", "eel"], 2, seed=0), 4)


def test_ids_are_plain_values() -> None:
    assert {type(name) for name in by_id(np.array([3, 1, 3]))} == {int}
    assert {name: part.tolist() for name, part in by_id([3, 1, 3]).items()} == {1: [1], 3: [0, 2]}
    assert list(by_id(np.array(["b", "a"], object))) == ["a", "b"]


def test_one_site_has_all() -> None:
    for part in (
        iid(5, 1, seed=0),
        dirichlet([0, 1, 0, 1, 2], 1, alpha=1, seed=0),
        shards([0, 1, 0, 1, 2], 1, seed=0),
        quantity_skew(5, 1, alpha=1, seed=0),
    ):
        check(part, 5)


def test_torch_is_not_imported() -> None:
    tree = ast.parse(Path(partition.__file__).read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert names == {"numpy", "numpy.typing"}


# refusals


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: iid(2, 3, seed=0), "2 rows .* 3 sites"),
        (lambda: iid(2, 0, seed=0), "2 rows .* 0 sites"),
        (lambda: iid(0, 1, seed=0), "0 rows .* 1 sites"),
        (lambda: dirichlet([1, 2], 3, alpha=1, seed=0), "2 rows .* 3 sites"),
        (lambda: dirichlet([1, 2], -1, alpha=1, seed=0), "2 rows .* -1 sites"),
        (lambda: dirichlet([], 1, alpha=1, seed=0), r"labels .* 1 or more, not of shape \[0\]"),
        (lambda: dirichlet([[1], [2]], 1, alpha=1, seed=0), r"not of shape \[2, 1\]"),
        (lambda: dirichlet(7, 1, alpha=1, seed=0), r"not of shape \[\]"),
        (lambda: dirichlet([1, np.nan], 1, alpha=1, seed=0), r"labels: row 1 of 2 .*nan"),
        (lambda: dirichlet([1, 2], 1, alpha=0, seed=0), r"above 0 and at most 1e\+100, not 0"),
        (lambda: dirichlet([1, 2], 1, alpha=-1.5, seed=0), "not -1.5"),
        (lambda: dirichlet([1, 2], 1, alpha=float("nan"), seed=0), "not nan"),
        (lambda: dirichlet([1, 2], 1, alpha=float("inf"), seed=0), "not inf"),
        (lambda: dirichlet([1, 2], 1, alpha=1e308, seed=0), r"not 1e\+308"),
        (lambda: dirichlet([1, 2], 2, alpha=1, seed=0, min_rows=2), "2 rows .* 2 rows .* 2 sites"),
        (lambda: dirichlet([1, 2], 2, alpha=1, seed=0, min_rows=-1), "2 rows .* -1 rows"),
        (
            lambda: dirichlet([0] * 20, 10, alpha=0.001, seed=0),
            "none of 1000 draws with alpha 0.001 gave each of 10 sites 1 of 20 rows: take a larger",
        ),
        (lambda: quantity_skew(2, 3, alpha=1, seed=0), "2 rows .* 3 sites"),
        (lambda: quantity_skew(-1, 1, alpha=1, seed=0), "-1 rows .* 1 sites"),
        (lambda: quantity_skew(2, 1, alpha=0, seed=0), "not 0"),
        (lambda: quantity_skew(9, 3, alpha=1, seed=0, min_rows=4), "9 rows .* 4 rows .* 3 sites"),
        (lambda: quantity_skew(20, 10, alpha=0.001, seed=0), "larger alpha, fewer sites"),
        (lambda: shards([], 1, seed=0), r"not of shape \[0\]"),
        (lambda: shards([[1, 2]], 1, seed=0), r"not of shape \[1, 2\]"),
        (lambda: shards([1, 2], 0, seed=0), "2 rows .* 0 sites"),
        (lambda: shards([1, 2, 3], 2, seed=0), "3 rows .* 2 shards .* 2 sites"),
        (lambda: shards([1, 2, 3], 2, per_site=0, seed=0), "3 rows .* 0 shards .* 2 sites"),
        (lambda: by_id([]), r"ids .* not of shape \[0\]"),
        (lambda: by_id([["a"]]), r"not of shape \[1, 1\]"),
        (lambda: by_id(["a", None, "b"]), r"ids: row 1 of 3 .*None"),
        (lambda: by_id(np.array(["2024-01-01", "NaT"], "M8[s]")), r"row 1 of 2"),
    ],
)
def test_what_makes_no_parts_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
