"""Members' vectors add up exactly, or the round aborts; what a member gives away tells nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.privacy.rounds import (
    LAST_ATTEMPT,
    Round,
    holds_nothing,
    name_of,
    numbers_of,
    play,
    round_of,
    sum_of,
    vectors_of,
)
from wsfed.errors import SecAggAborted
from wsfed.privacy.masks import dequantise, quantise
from wsfed.privacy.secagg import (
    Numbers,
    _derive,
    least_threshold,
    unpack_members,
    unpack_table,
)

# --- whole rounds --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 10])
def test_the_sum_is_exact(count: int) -> None:
    total, names, one = play(count, {}, length=1000)
    assert total == sum_of(one.vectors, set(range(1, count + 1)))
    assert names == [name_of(u) for u in range(1, count + 1)]
    assert all(holds_nothing(member) for member in one.members.values())


def test_the_sum_of_a_hundred_members_of_whom_many_are_lost_is_exact() -> None:
    """As many as can be: 33, at all stages."""
    leave = {
        0: {1, 50},
        1: {2, 51, 99},
        2: {6},
        3: {3, 4, 5, 52, 53, 98, 100},
        4: set(range(10, 20)),
        5: set(range(60, 70)),
    }
    total, names, one = play(100, leave, length=50)
    inside = set(range(1, 101)).difference(*(leave[step] for step in range(4)))
    assert total == sum_of(one.vectors, inside)
    assert names == [name_of(u) for u in sorted(inside)]


@pytest.mark.parametrize("stage", range(6))
@pytest.mark.parametrize("lost", [{1}, {10}, {4}, {1, 5, 10}, {8, 9, 10}])
def test_the_sum_is_exact_without_those_that_are_lost(stage: int, lost: set[int]) -> None:
    total, names, one = play(10, {stage: lost})  # t = 7, so that three may go
    inside = set(range(1, 11)) - (lost if stage < 4 else set())
    assert total == sum_of(one.vectors, inside)
    assert names == [name_of(u) for u in sorted(inside)]


def test_members_may_be_lost_at_every_stage() -> None:
    total, _, one = play(13, {0: {1}, 1: {2}, 3: {13}, 4: {7}})  # t = 9
    assert total == sum_of(one.vectors, set(range(3, 13)))


@pytest.mark.parametrize("stage", range(6))
def test_one_lost_member_too_many_aborts_the_round_and_is_named(stage: int) -> None:
    lost = {2, 3, 7, 10}
    with pytest.raises(SecAggAborted, match=r"6 members .* 7 are needed") as caught:
        play(10, {stage: lost})
    assert caught.value.round == 1
    assert caught.value.missing == tuple(name_of(u) for u in sorted(lost))


def test_quantised_numbers_come_back_as_their_sum() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (4, 200))
    numbers = numbers_of(4, length=200)
    vectors = {u: quantise(values[u - 1], 4, 1.0) for u in range(1, 5)}
    total, _ = Round(4, numbers, vectors, gone=set()).until(5).unmask()
    assert np.abs(dequantise(total, 4, 1.0) - values.sum(axis=0)).max() < 4 * 2**-29


@pytest.mark.parametrize(
    ("members", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (10, 7), (100, 67), (128, 86)]
)
def test_a_threshold_is_more_than_two_thirds(members: int, threshold: int) -> None:
    assert least_threshold(members) == threshold
    assert 3 * threshold > 2 * members >= 3 * (threshold - 1)


def test_what_members_send_is_of_known_sizes() -> None:
    """Of each round: keys and a signature, a box for each peer, a vector, a signature, shares."""
    count, length = 10, 1000
    _, _, one = play(count, {}, length)
    sizes: dict[int, set[int]] = {}
    for step, _, _, told in one.heard:
        sizes.setdefault(step, set()).add(len(told))
    assert sizes == {0: {128}, 1: {82}, 2: {1}, 3: {4 * length}, 4: {64}, 5: {33}}


# --- the numbers of a round ----------------------------------------------------------------------

_NUMBERS = st.builds(
    Numbers,
    session=st.binary(min_size=16, max_size=16),
    round=st.integers(1, 2**64 - 1),
    attempt=st.integers(0, LAST_ATTEMPT - 1),
    threshold=st.integers(-(2**63), 2**64 - 1),
    length=st.integers(1, 2**64 - 1),
    bound=st.floats(allow_nan=False),
    max_weight=st.integers(-(2**63), 2**64 - 1),
)
_ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(), st.binary())


@settings(deadline=None)
@given(_NUMBERS)
def test_numbers_come_back_from_their_bytes(numbers: Numbers) -> None:
    assert Numbers.unpack(numbers.packed) == numbers


@settings(deadline=None, max_examples=150)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.lists(_ANYTHING, max_size=9).map(msgpack.packb),
        st.tuples(_NUMBERS, st.integers(0, 60), st.binary(max_size=4)).map(
            lambda told: told[0].packed[: told[1]] + told[2] + told[0].packed[told[1] :]
        ),
    )
)
def test_any_bytes_are_numbers_or_refused(packed: bytes) -> None:
    try:
        numbers = Numbers.unpack(packed)
    except ValueError:
        return
    assert Numbers.unpack(numbers.packed).packed == numbers.packed


@pytest.mark.parametrize(
    "change",
    [
        {"session": bytes(15)},
        {"session": bytes(17)},
        {"round": 0},
        {"round": -1},
        {"attempt": -1},
        {"attempt": LAST_ATTEMPT},
        {"length": 0},
    ],
)
def test_malformed_numbers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="malformed"):
        numbers_of(4, **change)


@pytest.mark.parametrize("place", range(7))
def test_numbers_of_another_kind_are_refused(place: int) -> None:
    told = msgpack.unpackb(numbers_of(4).packed)
    for other in (True, "text", None, [1]):
        with pytest.raises(ValueError, match="no numbers of a round"):
            Numbers.unpack(msgpack.packb([*told[:place], other, *told[place + 1 :]]))


@pytest.mark.parametrize(
    "told",
    [
        [[1, b"x"], [1, b"y"]],  # the same member twice
        [[1, b"x", 2]],
        [["1", b"x"]],
        [[True, b"x"]],
        [[1, "x"]],
        [[1, bytes(257)]],
        [[1, b""]] * 200,
        {1: b"x"},
        [1, 2],
        7,
    ],
    ids=lambda told: str(told)[:20],
)
def test_what_is_no_table_is_refused(told: Any) -> None:
    with pytest.raises(ValueError, match="malformed"):
        unpack_table(msgpack.packb(told))


@pytest.mark.parametrize("told", [[1, "x"], [True], [b"x"], {1: 2}, 7, [1] * 200], ids=str)
def test_what_is_no_list_of_members_is_refused(told: Any) -> None:
    with pytest.raises(ValueError, match="malformed"):
        unpack_members(msgpack.packb(told))


def test_keys_are_derived_as_rfc_5869_says() -> None:
    """Its test case 3: no salt, no info; the first 32 bytes."""
    assert _derive(b"\x0b" * 22, b"").hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    )


def test_secrets_are_fresh_in_every_run() -> None:
    runs = [round_of(4, until=4) for _ in range(2)]
    for u in range(1, 5):
        (one, other) = ({bytes(t) for s, v, _, t in run.heard if v == u and s != 2} for run in runs)
        assert not one & other


# --- what who adds up sees -----------------------------------------------------------------------


def _chi_square(told: bytes) -> float:
    seen = np.bincount(np.frombuffer(told, np.uint8), minlength=256)
    return float(((seen - len(told) / 256) ** 2).sum() / (len(told) / 256))


#: A chi-square of 255 degrees of freedom is above it in one of a million runs.
_UNLIKELY = 377.1


def test_two_runs_with_one_sum_look_the_same() -> None:
    """Of other values, though: all alike in one run, all from one member in the other."""
    length, count = 2**13, 5
    alike = {u: np.full(length, 1000, np.uint32) for u in range(1, count + 1)}
    alone = {u: np.full(length, 5000 * (u == 3), np.uint32) for u in range(1, count + 1)}
    seen = []
    for vectors in (alike, alone):
        plain = b"".join(vector.tobytes() for vector in vectors.values())
        assert _chi_square(plain) > 1000 * _UNLIKELY  # the test would find them
        one = Round(count, numbers_of(count, length=length), vectors).until(5)
        total, _ = one.unmask()
        masked = b"".join(told for step, _, _, told in one.heard if step == 3)
        assert len(masked) == 4 * length * count
        assert _chi_square(masked) < _UNLIKELY
        seen.append(([(step, u, v, len(told)) for step, u, v, told in one.heard], total.tolist()))
    assert seen[0] == seen[1]
    assert seen[0][1] == [5000] * length


def test_two_rounds_in_one_process_know_nothing_of_each_other() -> None:
    one, other = round_of(4), round_of(4, round=2)
    other.vectors = vectors_of(4, seed=1)
    for each in (one, other):
        each.until(3)
    for each in (other, one):
        each.mask()
        each.confirm()
        total, _ = each.unmask()
        assert total.tolist() == sum_of(each.vectors, {1, 2, 3, 4})
    assert replace(one.numbers, round=2) == other.numbers
