"""Two sums whose difference tells one member's value: the second one is not to be had."""

from __future__ import annotations

import numpy as np
import pytest

from tests.privacy.rounds import Round, member_of, numbers_of, roster_of, vectors_of
from wsfed.errors import SecAggAborted
from wsfed.privacy.cohorts import CohortPolicy, Unmasked, check_cohort
from wsfed.privacy.journal import Journal
from wsfed.privacy.secagg import Member

ALL = "abcdefgh"
LOOSE = CohortPolicy()


def sum_of(members: str, model: int = 1, **changes: object) -> Unmasked:
    told = {"roster": "clinics", "epoch": 1, "dataset": "points", "model": bytes([model])}
    return Unmasked(**{**told, "members": frozenset(members), **changes})  # type: ignore[arg-type]


def check(
    earlier: list[Unmasked], new: Unmasked, policy: CohortPolicy = LOOSE, colluders: int = 1
) -> None:
    check_cohort(policy, colluders, earlier, new)


@pytest.mark.parametrize(
    "members",
    [
        "abcdefg",  # one less
        "abcdefghi",  # one more
        "abcdefgi",  # one for another, who may collude
        "abcdef",  # two less, of whom one may collude
        "abcdefghij",
    ],
)
def test_sums_of_one_model_that_tell_of_one_member_are_refused(members: str) -> None:
    with pytest.raises(ValueError, match=r"of the same model differ by [12] members"):
        check([sum_of(ALL)], sum_of(members))
    with pytest.raises(ValueError, match=r"of the same model differ by [12] members"):
        check([sum_of(members)], sum_of(ALL))


@pytest.mark.parametrize("members", [ALL, "abcde", "abcdefij", "hijklmno", "abcdefghijk"])
def test_sums_of_one_model_that_are_the_same_or_far_apart_are_to_be_had(members: str) -> None:
    check([sum_of(ALL)], sum_of(members))


def test_a_difference_of_two_is_to_be_had_where_nobody_colludes() -> None:
    check([sum_of(ALL)], sum_of("abcdef"), colluders=0)
    with pytest.raises(ValueError, match="differ by 1 members"):
        check([sum_of(ALL)], sum_of("abcdefg"), colluders=0)


def test_an_owner_may_ask_for_more_and_not_for_less() -> None:
    with pytest.raises(ValueError, match=r"differ by 3 members \('f', 'g', 'h'\), .* by 4 or more"):
        check([sum_of(ALL)], sum_of("abcde"), CohortPolicy(apart=4))
    with pytest.raises(ValueError, match="by 3 or more"):
        check([sum_of(ALL)], sum_of("abcdefg"), CohortPolicy(apart=1))


def test_every_earlier_sum_of_the_model_counts_and_not_the_last_one_only() -> None:
    earlier = [sum_of(ALL), sum_of("abcd"), sum_of("ijklm", model=2)]
    with pytest.raises(ValueError, match="of the same model"):
        check(earlier, sum_of("abcdefg"))


def test_a_lost_worker_that_stays_lost_is_one_move() -> None:
    earlier = [sum_of(ALL, model) for model in range(10)]
    for model in range(10, 30):
        new = sum_of("abcdefg", model)
        check(earlier, new, CohortPolicy(moves=1))
        earlier.append(new)


def test_moves_to_and_fro_are_counted() -> None:
    policy, earlier = CohortPolicy(moves=3), [sum_of(ALL, 0)]
    for model in range(1, 4):
        earlier.append(sum_of("abcdefg" if model % 2 else ALL, model))
        check(earlier[:-1], earlier[-1], policy)
    with pytest.raises(ValueError, match=r"move 4 to a group .* \('h'\); 3 are allowed"):
        check(earlier, sum_of(ALL, 4), policy)
    check(earlier, sum_of("abcdefg", 4), policy)  # it may stay where it is
    check(earlier, sum_of("ijklmn", 4), policy)  # or go far away


def test_a_move_is_near_to_any_earlier_group() -> None:
    earlier = [sum_of(ALL, 0), sum_of("ijklmn", 1)]
    with pytest.raises(ValueError, match="move 1"):
        check(earlier, sum_of("abcdefg", 2), CohortPolicy(moves=0))


def test_without_moves_a_lost_worker_ends_the_training() -> None:
    with pytest.raises(ValueError, match="until the owner signs the next epoch"):
        check([sum_of(ALL, 0)], sum_of("abcdefg", 1), CohortPolicy(moves=0))


@pytest.mark.parametrize("change", [{"epoch": 2}, {"roster": "others"}])
def test_an_owner_who_signs_another_roster_begins_anew(change: dict[str, object]) -> None:
    check([sum_of(ALL)], sum_of("abcdefg", **change), CohortPolicy(moves=0))


def test_data_sets_are_told_apart_where_the_owner_says_so() -> None:
    """Else a client that gives the same values another name would have both sums."""
    new = sum_of("abcdefg", dataset="others")
    with pytest.raises(ValueError, match="of the same model"):
        check([sum_of(ALL)], new)
    check([sum_of(ALL)], new, CohortPolicy(by_dataset=True, moves=0))
    with pytest.raises(ValueError, match="of the same model"):
        check([sum_of(ALL)], sum_of("abcdefg"), CohortPolicy(by_dataset=True))


@pytest.mark.parametrize("change", [{"apart": -1}, {"moves": -1}])
def test_settings_out_of_range_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        CohortPolicy(**change)


# --- in a round ----------------------------------------------------------------------------------


def _keeping(member: Member, journal: Journal, policy: CohortPolicy = LOOSE) -> None:
    """As a worker does it."""

    def approve(names: list[str], leaving: bool) -> None:
        new = Unmasked("clinics", 1, "points", member.model, frozenset(names))
        (journal.unmask if leaving else lambda new, rule: journal.check(rule))(
            new, lambda earlier: check_cohort(policy, 1, earlier, new)
        )

    member.approve = approve  # type: ignore[assignment]


def _round(session: int, journals: dict[int, Journal], gone: set[int]) -> Round:
    numbers = numbers_of(7, session=bytes([session]) * 16)
    members = {u: member_of(7, u, numbers=numbers) for u in range(1, 8)}
    for u, member in members.items():
        _keeping(member, journals[u])
    return Round(7, numbers, vectors_of(7), members=members, gone=gone)


def test_the_difference_of_two_sums_is_not_to_be_had_under_another_session() -> None:
    """The attack first succeeds, where members keep no journal, and gives one member's vector."""
    vectors = vectors_of(7)
    for keeps in (False, True):
        journals = {u: Journal() for u in range(1, 8)}
        sums = []
        for session, gone in enumerate([set(), {3}]):
            if not keeps:
                journals = {u: Journal() for u in range(1, 8)}
            one = _round(session, journals, gone).until(4)
            if keeps and session:
                with pytest.raises(SecAggAborted, match="of the same model differ by 1 members"):
                    one.confirm()
                break
            one.confirm()
            sums.append(one.unmask()[0])
        if not keeps:
            assert np.array_equal(sums[0] - sums[1], vectors[3])


def test_of_two_rounds_at_once_one_gives_no_shares() -> None:
    """Both are signed before shares for either have left: the answer itself is what is refused."""
    journals = {u: Journal() for u in range(1, 8)}
    one, other = _round(0, journals, set()).until(5), _round(1, journals, {3}).until(5)
    one.unmask()
    with pytest.raises(SecAggAborted, match="of the same model differ by 1 members"):
        other.members[1].unmask(other.said[5])
    assert not other.given


def test_a_sum_is_noted_before_shares_are_given() -> None:
    one = Round(4, numbers_of(4), vectors_of(4)).until(5)
    member, seen = one.members[1], []

    def approve(names: object, leaving: bool) -> None:
        seen.append((names, leaving, len(member._shares)))
        raise OSError("the disk is full")

    member.approve = approve
    with pytest.raises(OSError, match="disk is full"):
        member.unmask(one.said[5])
    assert seen == [(roster_of(4).order, True, 4)]
    with pytest.raises(SecAggAborted):
        member.unmask(one.said[5])


def test_who_is_refused_has_noted_nothing() -> None:
    journal, first = Journal(), sum_of(ALL)
    journal.unmask(first, lambda earlier: None)

    def refuse(earlier: object) -> None:
        assert earlier == [first]
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            journal.unmask(sum_of("abc"), refuse)
    seen: list[Unmasked] = []
    journal.check(seen.extend)
    assert seen == [first]
