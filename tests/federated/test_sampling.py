"""Who is chosen depends on seed, round and candidates alone, and as often as it should."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsfed.federated.sampling import (
    Candidate,
    Everyone,
    Sampler,
    Selection,
    Stratified,
    Uniform,
    Weighted,
    Where,
    tagged,
)


def people(count: int) -> list[Candidate]:
    """Sites of two countries in three sizes, every fourth of them a hospital."""
    return [
        Candidate(
            f"site-{i:03}",
            rows=10 ** (i % 3),
            tags=frozenset({"hospital"} if i % 4 == 0 else ()),
            worker="north" if i % 5 == 0 else "south",
        )
        for i in range(count)
    ]


def worker(candidate: Candidate) -> str:
    return candidate.worker


def names(candidates: Sequence[Candidate]) -> list[str]:
    return [candidate.site for candidate in candidates]


def often(sampler: Sampler, candidates: Sequence[Candidate], rounds: int = 2000) -> Counter[str]:
    """How many rounds each site is chosen in."""
    return Counter(
        site for number in range(rounds) for site in sampler(candidates, number, 0).chosen
    )


SAMPLERS: list[Sampler] = [
    Everyone(),
    Uniform(fraction=0.3),
    Uniform(count=4, extra=0.3),
    Weighted(fraction=0.3),
    Weighted(count=4, extra=0.5),
    Stratified(worker, fraction=0.4),
    Stratified(worker, count=5, extra=0.2),
    Where(tagged("hospital")),
    Where(tagged("hospital"), then=Uniform(count=2)),
]
DRAWING = [each for each in SAMPLERS if each not in (Everyone(), SAMPLERS[7])]


# all samplers


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(deadline=None, max_examples=40)
@given(
    order=st.integers(0, 30).flatmap(lambda count: st.permutations(people(count))),
    number=st.integers(0, 1000),
    seed=st.integers(0, 2**40),
)
def test_the_order_of_candidates_does_not_matter(
    sampler: Sampler, order: list[Candidate], number: int, seed: int
) -> None:
    selection = sampler(order, number, seed)
    straight = sampler(people(len(order)), number, seed)
    assert set(selection.chosen) == set(straight.chosen) and selection.wanted == straight.wanted
    assert list(selection.chosen) == [name for name in names(order) if name in selection.chosen]
    assert len(set(selection.chosen)) == len(selection.chosen) >= selection.wanted


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_round_can_be_repeated(sampler: Sampler) -> None:
    state = np.random.get_state()[1]
    assert sampler(people(20), 3, 7) == sampler(people(20), 3, 7)
    assert np.array_equal(state, np.random.get_state()[1])


@pytest.mark.parametrize("sampler", DRAWING)
def test_rounds_and_seeds_differ(sampler: Sampler) -> None:
    assert len({sampler(people(20), number, 7).chosen for number in range(20)}) > 3
    assert len({sampler(people(20), 3, seed).chosen for seed in range(20)}) > 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_of_nobody_nobody_is_chosen(sampler: Sampler) -> None:
    assert sampler([], 0, 0) == Selection((), 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_candidates_of_one_name_are_refused(sampler: Sampler) -> None:
    twins = [Candidate("a", 1, frozenset({"hospital"})), Candidate("b", 1)] * 2
    with pytest.raises(ValueError, match=r"2 of [24] candidates are called 'a'"):
        sampler(twins, 0, 0)


@pytest.mark.parametrize("sampler", DRAWING)
@pytest.mark.parametrize(("number", "seed"), [(-1, 0), (0, -1)])
def test_rounds_and_seeds_are_not_negative(sampler: Sampler, number: int, seed: int) -> None:
    with pytest.raises(ValueError, match=f"round {number} and seed {seed}"):
        sampler(people(9), number, seed)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_are_values(sampler: Sampler) -> None:
    assert hash(sampler) == hash(sampler) and not hasattr(sampler, "__dict__")


# everyone


def test_everyone_is_everyone() -> None:
    assert Everyone()(people(3), 0, 0) == Selection(("site-000", "site-001", "site-002"), 3)


# how many


@settings(deadline=None)
@given(
    there=st.integers(0, 60),
    fraction=st.floats(0, 1),
    at_least=st.integers(1, 8),
    extra=st.floats(0, 3),
)
def test_a_fraction_is_rounded_and_has_a_floor(
    there: int, fraction: float, at_least: int, extra: float
) -> None:
    sampler = Uniform(fraction=fraction, at_least=at_least, extra=extra)
    selection = sampler(people(there), 0, 0)
    assert selection.wanted == min(max(round(fraction * there), at_least), there)
    target = selection.wanted * (1 + extra)
    assert len(selection.chosen) == there or target - 1e-6 <= len(selection.chosen) < target + 1


@pytest.mark.parametrize(
    ("sampler", "there", "wanted", "chosen"),
    [
        (Uniform(fraction=0), 10, 1, 1),  # max(C * K, 1)
        (Uniform(fraction=1), 10, 10, 10),
        (Uniform(fraction=0.29), 100, 29, 29),  # 28.999999999999996
        (Uniform(fraction=0.1, at_least=3), 10, 3, 3),
        (Uniform(fraction=0.1, at_least=3), 2, 2, 2),
        (Uniform(count=4), 10, 4, 4),
        (Uniform(count=40), 10, 10, 10),
        (Uniform(count=10, extra=0.3), 100, 10, 13),
        (Uniform(count=5, extra=0.3), 100, 5, 7),  # rounded up
        (Uniform(count=30, extra=0.1), 100, 30, 33),  # 3.0000000000000004
        (Uniform(count=10, extra=0.3), 12, 10, 12),
        (Uniform(count=10, extra=0.3), 8, 8, 8),
        (Weighted(count=5, extra=0.3), 100, 5, 7),
        (Weighted(count=40), 10, 10, 10),
        (Stratified(worker, count=10), 50, 10, 10),
        (Stratified(worker, count=10, extra=0.3), 50, 10, 14),  # 2 + 1 and 8 + 3
        (Stratified(worker, count=1), 50, 2, 2),  # at least one of each
        (Stratified(worker, count=90, extra=0.3), 50, 50, 50),
    ],
)
def test_so_many_are_chosen(sampler: Sampler, there: int, wanted: int, chosen: int) -> None:
    selection = sampler(people(there), 0, 0)
    assert (selection.wanted, len(selection.chosen)) == (wanted, chosen)


# who


def test_uniform_chooses_all_alike() -> None:
    counts = often(Uniform(count=3), people(10))
    assert len(counts) == 10
    assert all(abs(count - 600) < 5 * math.sqrt(600 * 0.7) for count in counts.values())


def test_one_site_is_weighted_by_its_rows() -> None:
    candidates = [Candidate("a", 1), Candidate("b", 2), Candidate("c", 7)]
    counts = often(Weighted(count=1), candidates)
    for candidate in candidates:
        p = candidate.rows / 10
        assert abs(counts[candidate.site] - 2000 * p) < 5 * math.sqrt(2000 * p * (1 - p))


def test_several_sites_are_weighted_without_replacement() -> None:
    candidates = [Candidate("a", 1), Candidate("b", 2), Candidate("c", 7)]
    counts = often(Weighted(count=2), candidates)
    # a comes first, or second after b, or second after c
    p = 1 / 10 + 2 / 10 * 1 / 8 + 7 / 10 * 1 / 3
    assert abs(counts["a"] - 2000 * p) < 5 * math.sqrt(2000 * p * (1 - p))
    assert counts["a"] < counts["b"] < counts["c"] and sum(counts.values()) == 4000


def test_sites_without_rows_are_never_weighted() -> None:
    candidates = [Candidate("a", 0), Candidate("b", 5), Candidate("c", 0)]
    assert Weighted(count=3)(candidates, 0, 0) == Selection(("b",), 1)
    assert Weighted(count=3)(candidates[:1], 0, 0) == Selection((), 0)


def test_rows_may_be_many() -> None:
    candidates = [Candidate("a", 1), Candidate("b", 10**30)]
    assert Weighted(count=1)(candidates, 0, 0).chosen == ("b",)
    assert Weighted(count=2)(candidates, 0, 0).chosen == ("a", "b")


# strata


def of_each(sampler: Sampler, sizes: dict[str, int]) -> dict[str, int]:
    """How many of each stratum are chosen."""
    candidates = [
        Candidate(f"{name}-{i}", 1, worker=name)
        for name, size in sizes.items()
        for i in range(size)
    ]
    chosen = set(sampler(candidates, 0, 0).chosen)
    return dict(Counter(each.worker for each in candidates if each.site in chosen))


@pytest.mark.parametrize(
    ("sampler", "sizes", "chosen"),
    [
        (Stratified(worker, fraction=0.1), {"a": 60, "b": 40}, {"a": 6, "b": 4}),
        (Stratified(worker, fraction=0.1), {"a": 97, "b": 3}, {"a": 9, "b": 1}),
        (Stratified(worker, count=10), {"a": 55, "b": 27, "c": 18}, {"a": 5, "b": 3, "c": 2}),
        (Stratified(worker, count=2), {"a": 9, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}),
        (
            Stratified(worker, count=6, at_least=3),
            {"a": 90, "b": 9, "c": 2},
            {"a": 3, "b": 3, "c": 2},
        ),
        (Stratified(worker, fraction=1), {"a": 3, "b": 4}, {"a": 3, "b": 4}),
    ],
)
def test_each_stratum_gives_its_share(
    sampler: Sampler, sizes: dict[str, int], chosen: dict[str, int]
) -> None:
    assert of_each(sampler, sizes) == chosen


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1),
    st.integers(1, 100),
)
def test_shares_add_up(sizes: dict[str, int], count: int) -> None:
    chosen = of_each(Stratified(worker, count=count), sizes)
    there = sum(sizes.values())
    assert sum(chosen.values()) == max(min(count, there), len(sizes))
    assert all(1 <= chosen[name] <= size for name, size in sizes.items())
    for name, size in sizes.items():  # nobody gives more than its share but for rounding
        assert chosen[name] < max(min(count, there) * size / there + 1, 2)


def test_within_a_stratum_all_are_alike() -> None:
    counts = often(Stratified(worker, count=5), people(20))  # 4 north, 16 south
    for candidate in people(20):
        assert abs(counts[candidate.site] - 500) < 5 * math.sqrt(500 * 0.75)


# predicates


def test_only_those_who_may_take_part_do() -> None:
    hospitals = [each for each in people(20) if "hospital" in each.tags]
    assert list(Where(tagged("hospital"))(people(20), 0, 0).chosen) == names(hospitals)
    some = Where(tagged("hospital"), then=Uniform(fraction=0.5))(people(20), 0, 0)
    assert some == Uniform(fraction=0.5)(hospitals, 0, 0)
    assert Where(tagged("school"))(people(20), 0, 0) == Selection((), 0)


def test_predicates_nest() -> None:
    both = Where(tagged("hospital"), then=Where(lambda each: each.rows > 1))
    assert both(people(9), 0, 0).chosen == ("site-004", "site-008")


# refusals


@pytest.mark.parametrize("make", [Uniform, Weighted, lambda **how: Stratified(worker, **how)])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "fraction None and count None: give one"),
        ({"fraction": 0.5, "count": 3}, "fraction 0.5 and count 3: give one"),
        ({"fraction": -0.1}, "0 to 1, not -0.1"),
        ({"fraction": 1.1}, "0 to 1, not 1.1"),
        ({"fraction": math.nan}, "0 to 1, not nan"),
        ({"count": 0}, "1 or more, not 0"),
        ({"count": 3, "at_least": 0}, "at_least is 1 or more, not 0"),
        ({"count": 3, "at_least": 4}, "count of 3 is not at least 4"),
        ({"count": 3, "extra": -0.1}, "0 or more, and finite, not -0.1"),
        ({"count": 3, "extra": math.inf}, "finite, not inf"),
        ({"count": 3, "extra": math.nan}, "finite, not nan"),
    ],
)
def test_what_is_no_number_of_sites_is_refused(
    make: Callable[..., Sampler], how: dict[str, float], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        make(**how)


@pytest.mark.parametrize(("chosen", "wanted"), [((), 1), (("a",), 2), (("a",), -1)])
def test_no_more_replies_are_wanted_than_were_asked_for(
    chosen: tuple[str, ...], wanted: int
) -> None:
    with pytest.raises(ValueError, match=f"{wanted} replies are wanted of {len(chosen)} sites"):
        Selection(chosen, wanted)


def test_rows_are_not_negative() -> None:
    with pytest.raises(ValueError, match="'a' has 0 rows or more, not -1"):
        Candidate("a", -1)
