"""Rounds of secure aggregation with honest members, step by step, without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from wsfed.privacy.masks import Vector
from wsfed.privacy.roster import Roster, public_key
from wsfed.privacy.secagg import Collector, Member, Numbers, least_threshold, pack

SESSION = bytes(range(16))
#: No attempt at a round comes after it.
LAST_ATTEMPT = 2**32 - 1
MODEL = bytes([7]) * 32


@cache
def key_of(member: int, seed: int = 0) -> Ed25519PrivateKey:
    """The key that a member signs with: the same one in every run."""
    return Ed25519PrivateKey.from_private_bytes(bytes([seed, member]) * 16)


def name_of(member: int) -> str:
    """Sorts like the number."""
    return f"w{member:03}"


@cache
def roster_of(count: int, **changes: Any) -> Roster:
    members = {name_of(u): public_key(key_of(u)) for u in range(1, count + 1)}
    return Roster(**{"id": "clinics", "epoch": 1, "members": members, **changes})


def numbers_of(count: int, **changes: Any) -> Numbers:
    told = {
        "session": SESSION,
        "round": 1,
        "attempt": 0,
        "threshold": least_threshold(count),
        "length": 5,
        "bound": 1.0,
        "max_weight": 1_000,
    }
    return Numbers(**{**told, **changes})


def member_of(count: int, member: int, **changes: Any) -> Member:
    """Before round 0."""
    told = {
        "name": name_of(member),
        "key": key_of(member),
        "roster": roster_of(count),
        "numbers": numbers_of(count),
        "model": MODEL,
    }
    return Member(**{**told, **changes})


def vectors_of(count: int, length: int = 5, seed: int = 0) -> dict[int, Vector]:
    """Random in the whole ring."""
    made = np.random.default_rng(seed).integers(0, 2**32, (count, length), dtype=np.uint32)
    return {u: made[u - 1] for u in range(1, count + 1)}


def sum_of(vectors: Mapping[int, Vector], members: set[int]) -> list[int]:
    """Modulo 2 ** 32, in Python's integers."""
    return [sum(column) % 2**32 for column in zip(*(vectors[u].tolist() for u in members))]  # noqa: B905


def forget(_: int, __: int) -> None:
    """For ``remember``, where nothing is remembered."""


@dataclass
class Round:
    """One round; each method is one step of all members that have not gone away.

    Attributes:
        count: members of the roster.
        gone: members that take no further part.
        heard: what the collector was told: step, member, receiver and the bytes.
        said: what it told the members, by step; what a test changes here reaches them.
        dropped: whose shares could not be opened, and why they are not in U2.
        masked: what each member sent in round 3.
        given: what each member gave away in round 5.
        remember: of member 1.
    """

    count: int
    numbers: Numbers
    vectors: Mapping[int, Vector]
    gone: set[int] = field(default_factory=set)
    heard: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    said: dict[int, Any] = field(default_factory=dict)
    members: dict[int, Member] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    masked: dict[int, Vector] = field(default_factory=dict)
    given: dict[int, dict[int, bytes]] = field(default_factory=dict)
    remember: Callable[[int, int], None] = forget

    def __post_init__(self) -> None:
        self.collector = Collector(roster_of(self.count), self.numbers, MODEL)
        if not self.members:
            self.members = {
                u: member_of(self.count, u, numbers=self.numbers) for u in range(1, self.count + 1)
            }

    @property
    def there(self) -> dict[int, Member]:
        return {u: member for u, member in self.members.items() if u not in self.gone}

    def keys(self) -> dict[int, bytes]:
        for u, member in self.there.items():
            told = member.keys()
            self.heard.append((0, u, 0, told))
            self.collector.add_keys(u, told)
        self.said[1] = self.collector.all_keys()
        return dict(self.said[1])

    def share(self) -> dict[int, dict[int, bytes]]:
        for u, member in self.there.items():
            sealed = member.share(dict(self.said[1]))
            self.heard += [(1, u, v, box) for v, box in sealed.items()]
            self.collector.add_shares(u, sealed)
        self.said[2] = self.collector.shares_for()
        return dict(self.said[2])

    def open(self) -> list[int]:
        for u, member in self.there.items():
            failed = member.open(dict(self.said[2][u]))
            self.heard.append((2, u, 0, pack(failed)))
            self.collector.add_opened(u, failed)
        self.said[3], self.dropped = self.collector.members_that_mask()
        self.gone |= set(self.there) - set(self.said[3])
        return list(self.said[3])

    def mask(self) -> list[int]:
        for u, member in self.there.items():
            remember = self.remember if u == 1 else forget
            self.masked[u] = member.mask(list(self.said[3]), self.vectors[u].copy(), remember)
            self.heard.append((3, u, 0, self.masked[u].tobytes()))
            self.collector.add_masked(u, self.masked[u])
        self.said[4] = self.collector.members_of_sum()
        return list(self.said[4])

    def confirm(self) -> dict[int, bytes]:
        for u, member in self.there.items():
            signature = member.confirm(list(self.said[4]))
            self.heard.append((4, u, 0, signature))
            self.collector.add_signature(u, signature)
        self.said[5] = self.collector.all_signatures()
        return dict(self.said[5])

    def unmask(self) -> tuple[Vector, list[str]]:
        for u, member in self.there.items():
            self.given[u] = member.unmask(dict(self.said[5]))
            self.heard += [(5, u, v, told) for v, told in self.given[u].items()]
            self.collector.add_unmasking(u, self.given[u])
        return self.collector.total()

    def until(self, step: int) -> Round:
        """All steps before this one."""
        for take in (self.keys, self.share, self.open, self.mask, self.confirm, self.unmask)[:step]:
            take()
        return self


def round_of(count: int, *, until: int = 0, **changes: Any) -> Round:
    """A round of honest members, up to a step."""
    numbers = numbers_of(count, **changes)
    return Round(count, numbers, vectors_of(count, numbers.length)).until(until)


def play(
    count: int, leave: Mapping[int, set[int]], length: int = 5
) -> tuple[list[int], list[str], Round]:
    """A whole round.

    Args:
        count: members.
        leave: by step, who takes part before it and not in it.
        length: elements.
    """
    numbers = numbers_of(count, length=length)
    one = Round(count, numbers, vectors_of(count, length))
    for step, take in enumerate((one.keys, one.share, one.open, one.mask, one.confirm)):
        one.gone |= leave.get(step, set())
        take()
    one.gone |= leave.get(5, set())
    total, names = one.unmask()
    return total.tolist(), names, one


def holds_nothing(member: Member) -> bool:
    return (
        member._sealing is None
        and member._masking is None
        and not member._self_mask
        and not member._shares
        and not member._agreed
        and not member._pairs
    )
