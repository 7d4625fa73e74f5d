"""What a member refuses, step by step; whatever it refuses, it has given nothing away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.privacy.rounds import (
    LAST_ATTEMPT,
    MODEL,
    SESSION,
    Round,
    forget,
    holds_nothing,
    key_of,
    member_of,
    name_of,
    numbers_of,
    roster_of,
    round_of,
    sum_of,
    vectors_of,
)
from wsfed.errors import SecAggAborted
from wsfed.privacy.journal import Journal
from wsfed.privacy.masks import Vector, add_mask
from wsfed.privacy.secagg import (
    Collector,
    Member,
    _derive,
    _pair_info,
)
from wsfed.privacy.shamir import SHARE_BYTES, restore

#: X25519 points whose product with every key is zero (RFC 7748, section 6.1): little end first.
LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
]


def _ask(member: Member, step: int, said: dict[int, Any]) -> object:
    match step:
        case 0:
            return member.keys()
        case 1:
            return member.share(said.get(1, {}))
        case 2:
            return member.open(said.get(2, {}).get(member._u, {}))
        case 3:
            return member.mask(said.get(3, []), np.zeros(5, np.uint32), forget)
        case 4:
            return member.confirm(said.get(4, []))
        case _:
            return member.unmask(said.get(5, {}))


@contextmanager
def _refused(member: Member, says: str) -> Iterator[pytest.ExceptionInfo[SecAggAborted]]:
    """The member aborts, forgets its secrets, and takes no further step."""
    with pytest.raises(SecAggAborted, match=says) as caught:
        yield caught
    assert caught.value.round == member.numbers.round
    assert caught.value.reason.startswith(f"{member.name}: ")
    assert holds_nothing(member)
    for step in range(6):
        with pytest.raises(SecAggAborted, match="twice, or out of order"):
            _ask(member, step, {})


# --- what a member refuses before round 0 --------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threshold": 2}, "a threshold of 2 is below 3"),
        ({"threshold": 0}, "a threshold of 0 is below 3"),
        ({"threshold": -5}, "a threshold of -5 is below 3"),
        ({"bound": 1.5}, "bound 1.5 .* not the roster's"),
        ({"bound": 0.5}, "bound 0.5 .* not the roster's"),
        ({"bound": float("nan")}, "bound nan .* not the roster's"),
        ({"max_weight": 1_000_001}, "at most 1000000"),
        pytest.param(
            {"max_weight": 0},
            "weight 0",
        ),
        pytest.param(
            {"max_weight": -1},
            "weight -1",
        ),
    ],
)
def test_weaker_numbers_than_the_rosters_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SecAggAborted, match=says):
        member_of(4, 1, numbers=numbers_of(4, **change))


def test_who_is_not_in_the_roster_takes_no_part() -> None:
    with pytest.raises(SecAggAborted, match="'stranger' is not in the roster 'clinics'"):
        member_of(4, 1, name="stranger")


@pytest.mark.parametrize(
    ("now", "last", "allowed"),
    [
        ((1, 0), (0, -1), True),
        ((1, 0), (1, 0), False),
        ((1, 1), (1, 0), True),
        ((1, 0), (1, 1), False),
        ((1, 5), (1, LAST_ATTEMPT), False),
        ((2, 0), (1, LAST_ATTEMPT), True),
        ((1, 9), (2, 0), False),
    ],
)
def test_a_round_is_later_than_the_last_one(
    now: tuple[int, int], last: tuple[int, int], allowed: bool
) -> None:
    numbers = numbers_of(4, round=now[0], attempt=now[1])
    if allowed:
        assert len(member_of(4, 1, numbers=numbers, last_round=last).keys()) == 128
    else:
        with pytest.raises(SecAggAborted, match="took part in this round, or a later one"):
            member_of(4, 1, numbers=numbers, last_round=last)


# --- steps are taken once, in order --------------------------------------------------------------


@pytest.mark.parametrize(
    ("done", "asked"), [(done, asked) for done in range(7) for asked in range(6) if done != asked]
)
def test_a_step_twice_or_out_of_order_ends_the_members_part(done: int, asked: int) -> None:
    one = round_of(4, until=done)
    member = one.members[1]
    with _refused(member, "twice, or out of order"):
        _ask(member, asked, one.said)


# --- round 1: keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["left out", "exchanged", "of an earlier run", "of a neighbour"])
def test_a_member_finds_that_its_own_keys_are_not_there(how: str) -> None:
    one = round_of(4, until=1)
    keys = one.said[1]
    match how:
        case "left out":
            del keys[1]
        case "exchanged":
            keys[1], keys[2] = keys[2], keys[1]
        case "of an earlier run":
            keys[1] = member_of(4, 1).keys()
        case _:
            keys[1] = keys[2]
    with _refused(one.members[1], "its own keys were exchanged, or left out"):
        one.members[1].share(keys)


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": numbers_of(4, round=2)},
        {"numbers": numbers_of(4, attempt=1)},
        {"numbers": numbers_of(4, session=bytes(16))},
        {"numbers": numbers_of(4, threshold=4)},
        {"numbers": numbers_of(4, length=6)},
        {"numbers": numbers_of(4, max_weight=999)},
        {"model": bytes(32)},
        {"roster": roster_of(4, min_rows=33)},
        {"roster": roster_of(4, epoch=2)},
        {"roster": roster_of(5)},
        {"key": key_of(3)},
        {"key": key_of(2, seed=1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_keys_signed_for_another_context_are_refused(change: dict[str, Any]) -> None:
    """Members that were given different models, or numbers, find out before any secret leaves."""
    one = round_of(4, until=1)
    other = member_of(4, 2, **change)
    told = other.keys()
    with _refused(one.members[1], f"the keys of {name_of(2)!r} are not signed by it"):
        one.members[1].share({**one.said[1], 2: told})
    if "key" not in change:  # the other one finds out as well
        with _refused(other, f"the keys of {name_of(1)!r} are not signed by it"):
            other.share({**one.said[1], 2: told})


@pytest.mark.parametrize("place", [0, 31, 32, 63, 64, 127])
def test_keys_or_signatures_with_a_flipped_bit_are_refused(place: int) -> None:
    one = round_of(4, until=1)
    told = bytearray(one.said[1][3])
    told[place] ^= 0x10
    with _refused(one.members[1], "are not signed by it"):
        one.members[1].share({**one.said[1], 3: bytes(told)})


def test_keys_of_another_member_are_refused() -> None:
    one = round_of(4, until=1)
    with _refused(one.members[1], "are not signed by it"):
        one.members[1].share({**one.said[1], 3: one.said[1][2]})


@pytest.mark.parametrize("number", [-1, 0, 5, 2**16])
def test_keys_of_nobody_in_the_roster_are_refused(number: int) -> None:
    one = round_of(4, until=1)
    with _refused(one.members[1], f"nobody in the roster, or malformed ones: {number}"):
        one.members[1].share({**one.said[1], number: one.said[1][2]})


@pytest.mark.parametrize("size", [0, 64, 127, 129])
def test_malformed_keys_are_refused(size: int) -> None:
    one = round_of(4, until=1)
    with _refused(one.members[1], "malformed ones: 2"):
        one.members[1].share({**one.said[1], 2: bytes(size)})


def _signed(member: Member, sealing: bytes, masking: bytes) -> bytes:
    """What a member with these keys would say in round 0, be they its own or not."""
    public = sealing + masking
    return public + member.key.sign(member._signed_keys(member._u, public))


@pytest.mark.parametrize("copied", ["both", "sealing", "masking", "sealing as masking", "twice"])
def test_a_key_that_another_member_has_is_refused(copied: str) -> None:
    one = round_of(4, until=1)
    own, other = one.said[1][2], one.said[1][3]
    keys = {
        "both": (other[:32], other[32:64]),
        "sealing": (other[:32], own[32:64]),
        "masking": (own[:32], other[32:64]),
        "sealing as masking": (own[:32], other[:32]),
        "twice": (own[:32], own[:32]),
    }[copied]
    with _refused(one.members[1], "two members have the same key"):
        one.members[1].share({**one.said[1], 2: _signed(one.members[2], *keys)})


def test_too_few_keys_are_refused() -> None:
    one = round_of(4, until=1)
    with _refused(one.members[1], "2 members have said their keys, and 3 are needed"):
        one.members[1].share({u: one.said[1][u] for u in (1, 4)})


@pytest.mark.parametrize("change", [{"min_members": 5}, {"min_members": 6, "max_colluders": 3}])
def test_fewer_members_than_the_roster_asks_for_are_refused(change: dict[str, int]) -> None:
    roster = roster_of(6, **change)
    numbers = numbers_of(6, threshold=5)
    members = {
        u: member_of(6, u, roster=roster, numbers=numbers) for u in range(1, change["min_members"])
    }
    keys = {u: member.keys() for u, member in members.items()}
    with _refused(members[1], f"{change['min_members'] - 1} members have said their keys"):
        members[1].share(keys)


def test_a_threshold_that_is_low_for_so_many_members_is_refused() -> None:
    one = round_of(10, until=1, threshold=6)
    with _refused(one.members[1], "a threshold of 6 is below 7 for 10 members"):
        one.members[1].share(one.said[1])
    # For eight of them it is enough.
    keys = {u: told for u, told in one.said[1].items() if u < 9}
    assert set(one.members[2].share(keys)) == set(range(1, 9)) - {2}


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_sealing_key_of_low_order_is_refused(point: str) -> None:
    one = round_of(4, until=1)
    told = _signed(one.members[2], bytes.fromhex(point), one.said[1][2][32:64])
    with _refused(one.members[1], f"the key of {name_of(2)!r} is none") as caught:
        one.members[1].share({**one.said[1], 2: told})
    assert caught.value.missing == (name_of(2),)


# --- round 2: shares -----------------------------------------------------------------------------


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_peer_with_a_masking_key_of_low_order_is_dropped(point: str) -> None:
    one = round_of(5, until=1)
    liar = one.members[2]
    liar._own = one.said[1][2] = _signed(liar, one.said[1][2][:32], bytes.fromhex(point))
    one.share()
    assert one.members[1].open(one.said[2][1]) == [2]


def _altered(box: bytes, place: int) -> bytes:
    return box[:place] + bytes([box[place] ^ 1]) + box[place + 1 :]


@pytest.mark.parametrize("place", [0, 40, 66, 81])
def test_a_peer_whose_shares_cannot_be_opened_is_dropped(place: int) -> None:
    one = round_of(4, until=2)
    box = _altered(one.said[2][1][3], place)
    assert one.members[1].open({**one.said[2][1], 3: box}) == [3]


@pytest.mark.parametrize("size", [0, 15, 81, 83])
def test_shares_of_another_length_cannot_be_opened(size: int) -> None:
    one = round_of(4, until=2)
    assert one.members[1].open({**one.said[2][1], 3: bytes(size)}) == [3]


def test_shares_for_or_from_another_member_cannot_be_opened() -> None:
    for box in ((2, 3), (1, 2), (3, 1)):  # for 2 from 3; of its own for 2; for 3 of its own
        one = round_of(4, until=2)
        assert one.members[1].open({**one.said[2][1], 3: one.said[2][box[0]][box[1]]}) == [3]


@pytest.mark.parametrize("model", [MODEL, bytes(32)])
def test_shares_of_a_member_with_another_model_cannot_be_opened(model: bytes) -> None:
    """Even if its keys came to be signed for this one."""
    one = round_of(4, until=2)
    other = one.members[3]
    other._context = member_of(4, 3, model=model)._context
    box = AESGCM(other._sealing_key(3, 1)).encrypt(bytes(12), bytes(2 * SHARE_BYTES), None)
    failed = one.members[1].open({**one.said[2][1], 3: box})
    assert failed == ([] if model == MODEL else [3])


def test_with_too_few_whose_shares_can_be_opened_it_gives_up_and_names_them() -> None:
    one = round_of(4, until=2)
    boxes = {v: _altered(box, 9) if v in (2, 3) else box for v, box in one.said[2][1].items()}
    says = rf"2 members are left without {name_of(2)}, {name_of(3)}, .* and 3 are needed"
    with _refused(one.members[1], says) as caught:
        one.members[1].open(boxes)
    assert caught.value.missing == (name_of(2), name_of(3))


@pytest.mark.parametrize("others", [{2}, set()])
def test_too_few_shares_are_refused(others: set[int]) -> None:
    one = round_of(4, until=2)
    with _refused(one.members[1], "members are left, and 3 are needed"):
        one.members[1].open({u: one.said[2][1][u] for u in others})


def test_shares_of_who_has_said_no_keys_are_refused() -> None:
    one = Round(5, numbers_of(5), vectors_of(5), gone={5}).until(2)
    with _refused(one.members[1], "shares of who has said no keys, or of itself"):
        one.members[1].open({**one.said[2][1], 5: one.said[2][1][2]})


def test_shares_of_itself_are_refused() -> None:
    one = round_of(5, until=2)
    for own in (one.said[2][1][2], one.said[2][2][1]):
        sealed = {u: box for u, box in one.said[2][1].items() if u != 2}
        fresh = round_of(5, until=2)
        with _refused(fresh.members[1], "shares of who has said no keys, or of itself"):
            fresh.members[1].open({**sealed, 1: own})


def test_so_many_others_stay_that_one_of_them_is_honest_and_signs() -> None:
    """Of ten with up to four colluders and t = 7: eight, else the honest ones could be parted.

    Two groups, each of which is told that the other's shares cannot be opened, would have a sum
    each that the collector could tell.
    """
    roster = roster_of(10, min_members=6, max_colluders=4)
    members = {u: member_of(10, u, roster=roster) for u in range(1, 11)}
    one = Round(10, numbers_of(10), vectors_of(10), members=members)
    one.collector = Collector(roster, one.numbers, MODEL)
    one.until(2)
    few = {v: box for v, box in one.said[2][1].items() if v < 8}
    with _refused(one.members[1], "7 members are left, and 8 are needed"):
        one.members[1].open(few)
    assert one.members[2].open({v: box for v, box in one.said[2][2].items() if v < 9}) == []
    with _refused(one.members[2], "7 members are left, and 8 are needed"):
        _mask(one, list(range(1, 8)), 2)


# --- round 3: the vector -------------------------------------------------------------------------


def _mask(one: Round, u2: list[int], member: int = 1, length: int = 5) -> Vector:
    return one.members[member].mask(u2, np.zeros(length, np.uint32), forget)


@pytest.mark.parametrize("u2", [[2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4, 6], [1, 1, 2, 3, 4], []])
def test_masks_are_agreed_with_those_only_whose_shares_it_has(u2: list[int]) -> None:
    """Not with 5, who was dropped, nor with nobody, nor twice, nor without itself."""
    one = round_of(5, until=2)
    one.members[1].open({**one.said[2][1], 5: bytes(82)})
    with _refused(one.members[1], "go on with others than it has shares of"):
        _mask(one, u2)


def test_with_too_few_it_does_not_go_on() -> None:
    one = round_of(5, until=3)
    with _refused(one.members[1], "3 members are left, and 4 are needed"):
        _mask(one, [1, 2, 3])


@pytest.mark.parametrize("length", [0, 4, 6])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    one = round_of(4, until=3)
    with _refused(one.members[1], f"{length} elements of uint32, where 5 elements"):
        _mask(one, one.said[3], length=length)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64])
def test_a_vector_that_is_not_of_the_ring_is_refused(dtype: type) -> None:
    one = round_of(4, until=3)
    with pytest.raises((SecAggAborted, TypeError, ValueError)):
        one.members[1].mask(one.said[3], np.zeros(5, dtype), forget)


def test_a_member_remembers_the_round_before_it_gives_a_vector_away() -> None:
    one = round_of(4, until=3)
    vector, seen = vectors_of(4)[1], []

    def remember(number: int, attempt: int) -> None:
        seen.append((number, attempt, vector.tolist()))

    masked = one.members[1].mask(one.said[3], vector, remember)
    assert seen == [(1, 0, vectors_of(4)[1].tolist())]  # before anything was made
    assert masked is vector and masked.tolist() != seen[0][2]


def _fail(_: int, __: int) -> None:
    raise OSError("the disk is full")


def test_nothing_is_given_away_that_could_not_be_remembered() -> None:
    one = round_of(4, until=3)
    vector = vectors_of(4)[1]
    with pytest.raises(OSError, match="disk is full"):
        one.members[1].mask(one.said[3], vector, _fail)
    with pytest.raises(SecAggAborted):
        _mask(one, one.said[3])
    one = Round(4, numbers_of(4), vectors_of(4)).until(5)
    one.members[1]._remember = _fail
    with pytest.raises(OSError, match="disk is full"):
        one.members[1].unmask(one.said[5])
    with _refused(one.members[1], "twice, or out of order"):
        one.members[1].unmask(one.said[5])


@pytest.mark.parametrize("step", [3, 5])
def test_a_member_that_could_not_remember_holds_no_secrets(step: int) -> None:
    one = round_of(4, until=step)
    member = one.members[1]
    with pytest.raises(OSError, match="disk is full"):
        if step == 3:
            member.mask(one.said[3], vectors_of(4)[1], _fail)
        else:
            member._remember = _fail
            member.unmask(one.said[5])
    assert holds_nothing(member)


def test_a_round_is_remembered_as_final_before_shares_are_given() -> None:
    seen: list[tuple[int, int]] = []
    one = Round(4, numbers_of(4, round=7, attempt=2), vectors_of(4))
    one.remember = lambda number, attempt: seen.append((number, attempt))
    one.until(5)
    assert seen == [(7, 2)]
    one.unmask()
    assert seen == [(7, 2), (7, LAST_ATTEMPT)]


def test_a_member_that_was_restarted_does_not_take_part_again(tmp_path: Path) -> None:
    one = round_of(4, until=3)
    journal = Journal(tmp_path / "journal")
    one.remember = lambda number, attempt: journal.write(SESSION, number, attempt)
    one.mask()
    last = Journal(tmp_path / "journal").last(SESSION)
    with pytest.raises(SecAggAborted, match="took part in this round"):
        member_of(4, 1, last_round=last)
    one.confirm()
    one.unmask()
    last = Journal(tmp_path / "journal").last(SESSION)
    with pytest.raises(SecAggAborted, match="took part in this round"):
        member_of(4, 1, numbers=numbers_of(4, attempt=1), last_round=last)
    assert member_of(4, 1, numbers=numbers_of(4, round=2), last_round=last)


@pytest.mark.parametrize("second", [(1, 0), (1, 1)])
def test_one_of_two_parts_in_a_round_at_once_gives_nothing(second: tuple[int, int]) -> None:
    """Two connections to one worker, of which each began before the other had masked."""
    journal = Journal()
    rounds = [round_of(4), round_of(4, round=second[0], attempt=second[1])]
    for one in rounds:
        one.remember = lambda number, attempt: journal.write(SESSION, number, attempt)
        one.until(3)
    one, other = rounds
    one.mask()
    one.confirm()
    one.unmask()
    with pytest.raises((SecAggAborted, ValueError)):
        other.mask()


def test_an_earlier_round_is_not_remembered_over_a_later_one() -> None:
    journal = Journal()
    journal.write(SESSION, 2, LAST_ATTEMPT)
    try:
        journal.write(SESSION, 1, 0)
    except ValueError:
        pass
    assert journal.last(SESSION) == (2, LAST_ATTEMPT)


# --- round 4: who is in the sum ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("u3", "says"),
    [
        ([2, 3, 4], "of others than have shared"),  # without itself
        ([1, 2, 3, 5], "of others than have shared"),  # 5 is not in U2
        ([1, 2, 3, 6], "of others than have shared"),  # nobody
        ([0, 1, 2, 3], "of others than have shared"),
        ([1, 2, 3, 3], "of others than have shared"),
        ([1, 1, 2, 3], "of others than have shared"),
        ([1, 2, 3], "3 members are in the sum, and 4 are needed"),
        ([1], "1 members are in the sum, and 4 are needed"),
        ([], "of others than have shared"),
    ],
)
def test_a_sum_of_others_is_not_signed(u3: list[int], says: str) -> None:
    one = Round(5, numbers_of(5), vectors_of(5)).until(1)
    one.gone = {5}
    one.share()
    one.open()
    one.mask()
    with _refused(one.members[1], says):
        one.members[1].confirm(u3)


# --- round 5: one kind of share for each, once ---------------------------------------------------


def test_a_member_gives_one_share_for_each_other_and_never_both() -> None:
    one = Round(10, numbers_of(10), vectors_of(10)).until(3)
    self_masks = {u: member._self_mask for u, member in one.members.items()}
    keys = {u: m._masking.private_bytes_raw() for u, m in one.members.items() if m._masking}
    one.gone = {4, 9}
    one.mask()
    one.confirm()
    one.unmask()
    for given_away in one.given.values():
        assert set(given_away) == set(range(1, 11))
        assert {len(share) for share in given_away.values()} == {SHARE_BYTES}
    found = restore({u: [told[v] for v in range(1, 11)] for u, told in one.given.items()})
    assert found == [keys[v] if v in one.gone else self_masks[v] for v in range(1, 11)]


def test_shares_are_given_once() -> None:
    one = round_of(4, until=6)
    with _refused(one.members[1], "twice, or out of order"):
        one.members[1].unmask(one.said[5])


@pytest.mark.parametrize("left", [{1, 2}, set()])
def test_too_few_signatures_are_refused(left: set[int]) -> None:
    one = round_of(4, until=5)
    signatures = {u: told for u, told in one.said[5].items() if u in left}
    with _refused(one.members[1], "have signed that the sum is of the same members, and 3 are"):
        one.members[1].unmask(signatures)


def test_signatures_that_are_not_the_members_do_not_count() -> None:
    one = Round(5, numbers_of(5), vectors_of(5)).until(5)  # four are needed
    own, good = one.members[1], one.said[5]
    other = Round(5, numbers_of(5, round=2), vectors_of(5)).until(5).said[5]
    forged = {1: good[1], 2: good[3], 3: bytes(64), 4: other[4], 5: good[5], 0: good[2], 9: b""}
    with _refused(own, "2 members have signed"):
        own.unmask(forged)


def test_signatures_of_who_is_not_in_the_sum_do_not_count() -> None:
    one = Round(6, numbers_of(6), vectors_of(6)).until(3)  # five are needed
    one.gone = {6}
    one.mask()
    one.confirm()
    stray = one.members[6].key.sign(one.members[1]._signed_sum(one.said[4]))
    signatures = {u: told for u, told in one.said[5].items() if u != 5} | {6: stray}
    with _refused(one.members[1], "4 members have signed"):
        one.members[1].unmask(signatures)


@pytest.mark.parametrize("first", [5, 6])
def test_members_that_were_told_different_sums_give_no_shares(first: int) -> None:
    """The attack: shares of one member's self-mask from some, and of its key from the others."""
    one = round_of(10, until=4)
    told = {u: range(1, 10) if u <= first else range(2, 11) for u in range(2, 10)}
    told |= {1: range(1, 10), 10: range(2, 11)}
    signatures = {u: member.confirm(told[u]) for u, member in one.members.items()}
    for member in one.members.values():
        with _refused(member, "have signed that the sum is of the same members, and 7 are needed"):
            member.unmask(signatures)


def test_the_few_that_were_told_another_sum_than_the_most_give_no_shares() -> None:
    one = round_of(10, until=4)
    told = {u: range(1, 10) if u <= 7 else range(2, 11) for u in range(1, 11)}
    signatures = {u: member.confirm(told[u]) for u, member in one.members.items()}
    for u, member in one.members.items():
        if u <= 7:  # these agree
            assert len(member.unmask(signatures)) == 10
        else:
            with _refused(member, "3 members have signed"):
                member.unmask(signatures)


def test_a_vector_that_comes_late_stays_covered() -> None:
    """Who adds up has the shares of its key, and still not of its self-mask."""
    one = Round(4, numbers_of(4), vectors_of(4)).until(3)
    late = one.members[4]
    self_mask = late._self_mask
    one.gone = {4}
    one.mask()
    one.confirm()
    total, _ = one.unmask()
    assert total.tolist() == sum_of(one.vectors, {1, 2, 3})
    arrived = late.mask(one.said[3], one.vectors[4].copy(), forget)
    # All that who adds up can take away: the pairwise masks.
    key = X25519PrivateKey.from_private_bytes(restore({u: [t[4]] for u, t in one.given.items()})[0])
    for u in (1, 2, 3):
        agreed = key.exchange(X25519PublicKey.from_public_bytes(one.said[1][u][32:64]))
        add_mask(arrived, _derive(agreed, _pair_info(late._context, 4, u)), 1)
    both = total + arrived
    single = [vector.tolist() for vector in one.vectors.values()]
    assert arrived.tolist() not in single
    assert both.tolist() != sum_of(one.vectors, {1, 2, 3, 4})
    # It is the self-mask that covers it, of which no member gives a share any more.
    add_mask(arrived, _derive(self_mask, late._context + b"self"), -1)
    assert arrived.tolist() == one.vectors[4].tolist()
    for u in (1, 2, 3):
        with _refused(one.members[u], "twice, or out of order"):
            one.members[u].confirm([1, 2, 3, 4])
