"""Who adds up finds what members say wrong, as far as it can be found."""

from __future__ import annotations

import numpy as np
import pytest

from tests.privacy.rounds import (
    MODEL,
    Round,
    name_of,
    numbers_of,
    roster_of,
    round_of,
    sum_of,
    vectors_of,
)
from wsfed.errors import SecAggAborted
from wsfed.privacy.masks import Vector
from wsfed.privacy.secagg import (
    Collector,
)
from wsfed.privacy.shamir import SHARE_BYTES, split

# --- shares that cannot be opened ----------------------------------------------------------------


def _spoil(one: Round, pairs: dict[int, set[int]]) -> None:
    """By whose shares they are: for whom they are rubbish."""
    for liar, receivers in pairs.items():
        for v in receivers:
            one.said[2][v][liar] = bytes(82)


@pytest.mark.parametrize("count", [4, 5, 10])
@pytest.mark.parametrize("receivers", [{1}, {1, 3}, set(range(1, 11)) - {2}], ids=len)
def test_who_seals_rubbish_is_left_out_and_the_sum_of_the_others_is_exact(
    count: int, receivers: set[int]
) -> None:
    one = round_of(count, until=2)
    _spoil(one, {2: {v for v in receivers if v <= count}})
    assert one.open() == [u for u in range(1, count + 1) if u != 2]
    assert set(one.dropped) == {name_of(2)}
    assert f"{name_of(1)}" in one.dropped[name_of(2)]
    one.mask()
    one.confirm()
    total, names = one.unmask()
    assert total.tolist() == sum_of(one.vectors, set(range(1, count + 1)) - {2})
    assert name_of(2) not in names


def test_who_says_so_of_everybody_is_left_out_itself() -> None:
    one = round_of(7, until=2)
    _spoil(one, {u: {3} for u in (1, 2)})  # five are needed, so it may say so of two
    assert one.members[3].open(one.said[2][3]) == [1, 2]
    one = round_of(7, until=2)
    for u in range(1, 8):
        one.collector.add_opened(u, {1, 2} if u == 3 else set())
    left, dropped = one.collector.members_that_mask()
    assert left == [1, 2, 4, 5, 6, 7]
    assert set(dropped) == {name_of(3)}


def test_two_who_seal_rubbish_are_left_out_of_seven() -> None:
    one = round_of(7, until=2)
    _spoil(one, {2: {1, 3, 4}, 5: {4, 6}})
    assert one.open() == [1, 3, 4, 6, 7]
    one.mask()
    one.confirm()
    total, _ = one.unmask()
    assert total.tolist() == sum_of(one.vectors, {1, 3, 4, 6, 7})


def test_with_too_few_that_can_open_each_others_shares_the_round_aborts() -> None:
    one = round_of(5, until=2)  # four are needed
    _spoil(one, {2: {1}, 4: {3}})
    with pytest.raises(SecAggAborted, match=r"3 members can open .* 4 are needed") as caught:
        one.open()
    assert caught.value.missing == (name_of(2), name_of(4))


def test_who_does_not_say_what_it_could_open_is_lost() -> None:
    one = round_of(5, until=2)
    one.gone = {5}
    assert one.open() == [1, 2, 3, 4]
    assert not one.dropped


@pytest.mark.parametrize(("member", "failed"), [(1, {1}), (1, {9}), (5, set())])
def test_reports_of_shares_that_were_not_given_are_refused(member: int, failed: set[int]) -> None:
    one = Round(5, numbers_of(5), vectors_of(5)).until(1)
    one.gone = {5}
    one.share()
    with pytest.raises(SecAggAborted, match="tells of shares it was not given"):
        one.collector.add_opened(member, failed)


# --- who adds up ---------------------------------------------------------------------------------


def test_a_collector_knows_members_by_their_number() -> None:
    collector = Collector(roster_of(4), numbers_of(4), MODEL)
    assert [collector.number_of(name_of(u)) for u in range(1, 5)] == [1, 2, 3, 4]
    with pytest.raises(ValueError):
        collector.number_of("stranger")


@pytest.mark.parametrize("to", [{2, 3}, {1, 2, 3, 4}, {2, 3, 5}, set()])
def test_sealed_shares_for_others_than_all_are_refused(to: set[int]) -> None:
    one = round_of(4, until=1)
    with pytest.raises(SecAggAborted, match=f"{name_of(1)} has not sealed for all members"):
        one.collector.add_shares(1, dict.fromkeys(to, b""))


def test_sealed_shares_of_who_has_said_no_keys_are_refused() -> None:
    one = Round(5, numbers_of(5), vectors_of(5), gone={5}).until(1)
    with pytest.raises(SecAggAborted, match=f"{name_of(5)} has not sealed"):
        one.collector.add_shares(5, dict.fromkeys({1, 2, 3, 4}, b""))


def test_a_masked_vector_that_is_not_due_is_refused() -> None:
    one = Round(5, numbers_of(5), vectors_of(5)).until(1)
    one.gone = {5}
    one.share()
    one.open()
    due = {1: (6,), 2: (4,), 3: (1, 5), 4: (5, 1), 5: (5,)}  # 5 has shared nothing
    for u, shape in due.items():
        with pytest.raises(SecAggAborted, match=f"{name_of(u)} has sent a vector that is not due"):
            one.collector.add_masked(u, np.ones(shape, np.uint32))
    one.mask()
    with pytest.raises(SecAggAborted, match=f"{name_of(1)} has sent a vector that is not due"):
        one.collector.add_masked(1, one.masked[1])
    one.confirm()
    total, _ = one.unmask()
    assert total.tolist() == sum_of(one.vectors, {1, 2, 3, 4})  # what was refused is not in it


def test_wrong_signatures_are_not_passed_on() -> None:
    one = round_of(4, until=4)
    signatures = {u: member.confirm(one.said[4]) for u, member in one.members.items()}
    one.collector.add_signature(1, signatures[2])
    one.collector.add_signature(2, bytes(64))
    one.collector.add_signature(3, b"")
    one.collector.add_signature(4, signatures[4])
    with pytest.raises(SecAggAborted, match="1 members have signed") as caught:
        one.collector.all_signatures()
    assert caught.value.missing == tuple(name_of(u) for u in (1, 2, 3))


@pytest.mark.parametrize("of", [{1, 2, 3}, {1, 2, 3, 4, 5}, {1, 2, 3, 5}, set()])
def test_shares_of_others_than_are_due_are_refused(of: set[int]) -> None:
    one = round_of(4, until=5)
    with pytest.raises(SecAggAborted, match=f"{name_of(1)} has given other shares than are due"):
        one.collector.add_unmasking(1, dict.fromkeys(of, bytes(SHARE_BYTES)))


def test_shares_of_who_has_not_signed_are_refused() -> None:
    one = round_of(4, until=4)
    one.gone = {4}
    one.confirm()
    shares = dict.fromkeys(range(1, 5), bytes(SHARE_BYTES))
    with pytest.raises(SecAggAborted, match=f"{name_of(4)} has given other shares"):
        one.collector.add_unmasking(4, shares)


def _unmasked(one: Round, exchange: dict[int, dict[int, bytes]]) -> tuple[Vector, list[str]]:
    """The last round, in which some shares are exchanged: by who gives them, and of whom."""
    for u, member in one.there.items():
        one.collector.add_unmasking(u, {**member.unmask(one.said[5]), **exchange.get(u, {})})
    return one.collector.total()


def test_shares_of_another_key_than_the_lost_members_are_found() -> None:
    one = Round(4, numbers_of(4), vectors_of(4)).until(3)
    one.gone = {4}
    one.mask()
    one.confirm()
    other = split(bytes(range(32)), 3, [1, 2, 3])
    with pytest.raises(SecAggAborted, match=f"shares of {name_of(4)}'s key are not its own"):
        _unmasked(one, {u: {4: other[u]} for u in other})


def test_one_wrong_share_of_a_lost_members_key_is_found() -> None:
    one = Round(4, numbers_of(4), vectors_of(4)).until(3)
    one.gone = {4}
    one.mask()
    one.confirm()
    with pytest.raises(SecAggAborted, match=r"not its own|do not fit"):
        _unmasked(one, {2: {4: bytes(SHARE_BYTES)}})


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), b"\xff" * 33])
def test_malformed_shares_abort_the_round(share: bytes) -> None:
    with pytest.raises(SecAggAborted, match="shares do not fit: a share is 33 bytes"):
        _unmasked(round_of(4, until=5), {2: {3: share}})


def test_shares_of_no_secret_abort_the_round() -> None:
    """All three lie on a line that is above every secret at 0."""
    shares = {u: {2: (u - 1).to_bytes(SHARE_BYTES, "big")} for u in (1, 2, 3)}
    with pytest.raises(SecAggAborted, match="shares do not fit: these shares do not belong"):
        _unmasked(round_of(4, until=5), shares)


def test_a_wrong_share_of_a_self_mask_shows_in_an_element_that_all_know() -> None:
    """A public key tells it of the other masks. Here each member adds a one at the end."""
    one = round_of(4, until=0)
    one.vectors = {u: np.array([1, 2, 3, 4, 1], np.uint32) for u in range(1, 5)}
    one.until(5)
    try:
        total, _ = _unmasked(one, {2: {3: bytes(SHARE_BYTES)}})
        assert total[-1] != 4
    except SecAggAborted:
        pass  # what was restored is above all secrets
