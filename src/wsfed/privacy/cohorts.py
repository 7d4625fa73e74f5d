"""Who was in the sums that a member has helped to unmask: two of them may differ by one member.

Let ``A`` and ``B`` be the members of two sums under one model, in which everybody contributes the
same in both. Their difference is the sum over those of ``A`` only, less the sum over those of ``B``
only. Where one member is in one of them only, that is its value; where there are two, it is its
value once the other one, who colludes, has taken its own away. So both have to differ by two
members more than may collude, or by none.

Under another model the contributions differ, and the difference tells less; how much less is the
choice of who chooses the models. A member cannot tell a worker that was lost from one that was left
out on purpose. So it goes along with a few such moves, which bounds how many of these differences
there are, and after them stays with the cohort that it was in last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["CohortPolicy", "Unmasked", "check_cohort"]


@dataclass(frozen=True, slots=True)
class Unmasked:
    """A sum that a member gives its shares for.

    Attributes:
        roster: its id.
        epoch: of the roster.
        dataset: whose rows were counted, on this member.
        model: SHA-256 of the model that was given.
        members: of the sum, by name.
    """

    roster: str
    epoch: int
    dataset: str
    model: bytes
    members: frozenset[str]


@dataclass(frozen=True, slots=True)
class CohortPolicy:
    """What a member's owner lets be told by the difference of two sums, in an epoch of the roster.

    Attributes:
        apart: members by which two sums have to differ, or by none; the roster's
            ``max_colluders + 2`` where that is more.
        moves: to a cohort that is nearer than that to an earlier one, under other models, at most;
            0 where a lost worker ends the training. Under the same model there is none at all.
        by_dataset: sums over different data sets of this member are not compared. Only for owners
            who let in none but clients that they trust with the name of the data set: a worker
            cannot tell what it is that a client has computed its values from.
    """

    apart: int = 0
    moves: int = 8
    by_dataset: bool = False

    def __post_init__(self) -> None:
        if self.apart < 0 or self.moves < 0:
            raise ValueError(f"out of range: apart {self.apart}, moves {self.moves}")


def check_cohort(
    policy: CohortPolicy, colluders: int, earlier: Sequence[Unmasked], new: Unmasked
) -> None:
    """Whether shares may be given for a sum.

    Args:
        policy: of the member's owner.
        colluders: of the roster: ``max_colluders``.
        earlier: all sums that shares were given for, in their order.
        new: the one that is asked for.

    Raises:
        ValueError: the sum is too near to an earlier one.
    """
    apart = max(policy.apart, colluders + 2)
    same = [
        each
        for each in earlier
        if (each.roster, each.epoch) == (new.roster, new.epoch)
        and (each.dataset == new.dataset or not policy.by_dataset)
    ]
    for members in {each.members for each in same if each.model == new.model}:
        if _is_near(members, new.members, apart):
            raise ValueError(
                f"this sum and an earlier one of the same model differ by "
                f"{len(members ^ new.members)} members ({_differing(members, new.members)}), and "
                f"have to differ by {apart} or more, or by none"
            )
    cohorts = [each.members for each in same]
    moves = sum(_moves([*cohorts, new.members], apart))
    if moves > policy.moves and cohorts[-1] != new.members:
        raise ValueError(
            f"this is move {moves} to a group that differs from an earlier one by less than "
            f"{apart} members ({_differing(cohorts[-1], new.members)}); {policy.moves} are allowed "
            "until the owner signs the next epoch of the roster"
        )


def _moves(cohorts: Sequence[frozenset[str]], apart: int) -> Iterator[bool]:
    """For each cohort whether it is another than the one before, and near to any earlier one."""
    seen: set[frozenset[str]] = set()
    before: frozenset[str] | None = None
    for members in cohorts:
        if members != before:
            yield any(_is_near(members, each, apart) for each in seen)
        seen.add(members)
        before = members


def _is_near(one: frozenset[str], other: frozenset[str], apart: int) -> bool:
    return 0 < len(one ^ other) < apart


def _differing(one: frozenset[str], other: frozenset[str]) -> str:
    return ", ".join(sorted(map(repr, one ^ other))[:5])
