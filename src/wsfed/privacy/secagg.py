"""``wsfed-secagg/1``: members add up vectors so that nobody sees one of them.

After Bonawitz et al. 2017, *Practical secure aggregation for privacy-preserving machine learning*,
with the consistency round, signed keys, and the model bound into every key. Both roles are here,
without I/O: a :class:`Member` is a worker, the :class:`Collector` who adds up and learns the sum.

=====  =========================  ==========================  ====================================
round  member → collector         collector → members         then a member
=====  =========================  ==========================  ====================================
0      two public keys, signed    those of all, U1            checks every signature
1      a share of its two         to each what is for it      opens the shares
       secrets for each member
2      whose it could not open    who is left, U2             masks its vector for U2
3      its vector, masked         who has sent one, U3        signs U3
4      the signature              those of t members          checks that all have signed one U3
5      for each of U3 a share of  nothing                     forgets everything
       its own mask; for those
       lost after round 2, of
       its pairwise masks
=====  =========================  ==========================  ====================================

What is sent is ``values + PRG(b_u) + sum(PRG(k_uv), v > u) - sum(PRG(k_uv), v < u)`` modulo
2 ** 32, over the others of U2. In the sum over U3 pairwise masks cancel but for those with lost
members; shares of ``t`` members restore these, and the self-masks ``b_u`` of U3. A member never
gives both for one other, and never a second vector for a round: a vector that comes late is covered
by its self-mask for good.

A member does not go on with whom it cannot open the shares of, and may be told to go on with fewer.
So that nobody can part the honest members into groups with a sum for each, it keeps at least
``|U1| + max_colluders + 1 - t``: among these is an honest one of the ``t`` who sign U3, all of whom
have masks in common with everybody in it.

The context, which enters every signature and every key, holds the hash of the roster, the session,
the round, the attempt, the numbers of the round, and the hash of the model that the member was
given. Members with different models cannot open each other's shares: the round aborts.

This implementation has not been reviewed by a cryptographer.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import msgpack
import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from wsfed.errors import SecAggAborted
from wsfed.privacy.masks import Vector, add_mask
from wsfed.privacy.roster import MOST_MEMBERS, Roster
from wsfed.privacy.shamir import SHARE_BYTES, restore, split

__all__ = [
    *("EXTRA", "Collector", "Member", "Numbers", "least_threshold", "pack", "unpack_members"),
    "unpack_table",
]

#: Elements behind the values: rows, and a one that tells whether all masks have cancelled.
EXTRA: Final = 2

_NAME: Final = b"wsfed-secagg/1"
_KEYS: Final = 128  # two public keys and a signature
_SEALED: Final = 2 * SHARE_BYTES + 16  # two shares and the tag
#: No attempt at a round comes after it.
_LAST_ATTEMPT: Final = 2**32 - 1
#: Each key seals one message, so that its nonce never repeats.
_NONCE: Final = bytes(12)


def least_threshold(members: int) -> int:
    """Members whose shares restore a secret, at least: more than two thirds."""
    return 2 * members // 3 + 1


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of one round; everybody has to have the same ones.

    Attributes:
        session: 16 random bytes of the training.
        round: from 1, and growing.
        attempt: of this round, from 0.
        threshold: ``t``.
        length: elements of the vectors.
        bound: of what is added up.
        max_weight: rows count up to so many.
    """

    session: bytes
    round: int
    attempt: int
    threshold: int
    length: int
    bound: float
    max_weight: int

    def __post_init__(self) -> None:
        if (
            len(self.session) != 16
            or self.round < 1
            or not 0 <= self.attempt < _LAST_ATTEMPT
            or self.length < 1
        ):
            raise ValueError("malformed numbers of a round of secure aggregation")

    @property
    def packed(self) -> bytes:
        """As they travel."""
        packed: bytes = msgpack.packb(
            [
                *(self.session, self.round, self.attempt, self.threshold, self.length),
                *(float(self.bound), self.max_weight),
            ]
        )
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> Numbers:
        """From :attr:`packed`.

        Raises:
            ValueError: malformed.
        """
        try:
            told = msgpack.unpackb(packed, max_bin_len=16, max_array_len=7)
            kinds = [bytes, int, int, int, int, float, int]
            if [type(each) for each in told] != kinds:
                raise ValueError("malformed")
            return cls(*told)
        except Exception as error:
            raise ValueError(f"no numbers of a round of secure aggregation: {error}") from None


def _context(roster: Roster, numbers: Numbers, model: bytes) -> bytes:
    """What a round is, in 32 bytes: a hash of fields of fixed lengths."""
    fixed = numbers.session + struct.pack(">QI", numbers.round, numbers.attempt)
    config = hashlib.sha256(numbers.packed).digest()
    return hashlib.sha256(_NAME + roster.hash + fixed + config + model).digest()


def _derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


def _who(members: Iterable[int]) -> bytes:
    return b"".join(struct.pack(">H", each) for each in sorted(members))


def _complaints(pairs: Sequence[tuple[int, int]], member: int) -> tuple[int, int]:
    """Of how many pairs it is one, and in how many of these the one whose shares are meant."""
    return sum(member in pair for pair in pairs), sum(member == of for _, of in pairs)


def _is_signed(key: str, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _pair_info(context: bytes, one: int, other: int) -> bytes:
    return context + b"pair" + struct.pack(">HH", min(one, other), max(one, other))


# --- as it travels -------------------------------------------------------------------------------


def pack(told: Mapping[int, bytes] | Sequence[int]) -> bytes:
    """A table by member, or a list of members, as it travels."""
    plain = [list(row) for row in told.items()] if isinstance(told, Mapping) else list(told)
    packed: bytes = msgpack.packb(plain)
    return packed


def unpack_table(packed: bytes) -> dict[int, bytes]:
    """A table by member.

    Raises:
        ValueError: it is none.
    """
    rows = _unpack(packed)
    is_table = all(
        type(row) is list and len(row) == 2 and type(row[0]) is int and type(row[1]) is bytes
        for row in rows
    )
    if not is_table or len({row[0] for row in rows}) != len(rows):
        raise ValueError("malformed step of secure aggregation: no table of members")
    return dict(rows)


def unpack_members(packed: bytes) -> list[int]:
    """A list of members.

    Raises:
        ValueError: it is none.
    """
    members = _unpack(packed)
    if not all(type(each) is int for each in members):
        raise ValueError("malformed step of secure aggregation: no list of members")
    return members


def _unpack(packed: bytes) -> list[Any]:
    try:
        told = msgpack.unpackb(packed, max_bin_len=256, max_array_len=MOST_MEMBERS)
    except Exception as error:
        raise ValueError(f"malformed step of secure aggregation: {error}") from None
    if type(told) is not list:
        raise ValueError("malformed step of secure aggregation: no list")
    return told


# --- who contributes -----------------------------------------------------------------------------


@dataclass(slots=True)
class Member:
    """One who contributes a vector, in one round. Each step can be taken once, in order.

    Any step may raise :class:`SecAggAborted`: this member takes no further part, and has forgotten
    its secrets.

    Args:
        name: as the roster has it.
        key: that it signs with.
        roster: pinned, of its owner.
        numbers: of the round, as the collector says them.
        model: SHA-256 of the model that it was given.
        last_round: the last round of this session in which it took part.
        approve: told in rounds 4 and 5 who is in the sum, by name, and whether shares for it leave
            now; raises ``ValueError`` where the sum is not to be had.
    """

    name: str
    key: Ed25519PrivateKey
    roster: Roster
    numbers: Numbers
    model: bytes
    last_round: tuple[int, int] = (0, -1)
    approve: Callable[[Sequence[str], bool], None] | None = None
    _step: int = 0
    _u: int = 0
    _context: bytes = b""
    _sealing: X25519PrivateKey | None = None
    _masking: X25519PrivateKey | None = None
    _self_mask: bytes = b""
    _own: bytes = b""
    _u1: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    _shares: dict[int, bytes] = field(default_factory=dict)
    _agreed: dict[int, bytes] = field(default_factory=dict)
    _pairs: dict[int, bytes] = field(default_factory=dict)
    _u3: frozenset[int] = frozenset()
    _remember: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.name not in self.roster.members:
            raise self._abort(f"{self.name!r} is not in the roster {self.roster.id!r}")
        self._u = self.roster.order.index(self.name) + 1
        self._context = _context(self.roster, self.numbers, self.model)
        self._check_numbers()

    def _check_numbers(self) -> None:
        numbers, roster = self.numbers, self.roster
        floor = least_threshold(roster.min_members)
        if numbers.threshold < floor:
            raise self._abort(f"a threshold of {numbers.threshold} is below {floor}")
        if numbers.bound != roster.bound or not 1 <= numbers.max_weight <= roster.max_weight:
            raise self._abort(
                f"bound {numbers.bound} and weight {numbers.max_weight} are not the roster's: "
                f"{roster.bound}, at most {roster.max_weight}"
            )
        if (numbers.round, numbers.attempt) <= self.last_round:
            raise self._abort("this member took part in this round, or a later one, already")

    def _abort(self, reason: str, missing: Sequence[str] = ()) -> SecAggAborted:
        self._forget()
        self._step = -1
        return SecAggAborted(self.numbers.round, f"{self.name}: {reason}", missing)

    def _forget(self) -> None:
        self._sealing = self._masking = None
        self._self_mask = b""
        self._shares.clear()
        self._agreed.clear()
        self._pairs.clear()

    def _take(self, step: int) -> None:
        if self._step != step:
            raise self._abort("a step was asked for twice, or out of order")
        self._step = step + 1

    def _names(self, members: Iterable[int]) -> list[str]:
        order = self.roster.order
        return [order[each - 1] if 0 < each <= len(order) else f"#{each}" for each in members]

    def keys(self) -> bytes:
        """Round 0: fresh public keys, signed."""
        self._take(0)
        self._sealing, self._masking = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        public = b"".join(
            key.public_key().public_bytes_raw() for key in (self._sealing, self._masking)
        )
        self._own = public + self.key.sign(self._signed_keys(self._u, public))
        return self._own

    def _signed_keys(self, member: int, public: bytes) -> bytes:
        return self._context + b"\x00" + _who([member]) + public

    def share(self, keys: Mapping[int, bytes]) -> dict[int, bytes]:
        """Round 1: shares of this member's secrets, sealed for each other member of U1.

        Args:
            keys: of U1, by number, what each said in round 0.
        """
        self._take(1)
        self._check_keys(keys)
        assert self._sealing is not None
        assert self._masking is not None
        self._u1 = {v: (told[:32], told[32:64]) for v, told in keys.items()}
        self._self_mask = X25519PrivateKey.generate().private_bytes_raw()
        places, threshold = sorted(self._u1), self.numbers.threshold
        masking = split(self._masking.private_bytes_raw(), threshold, places)
        self_mask = split(self._self_mask, threshold, places)
        self._shares[self._u] = masking[self._u] + self_mask[self._u]
        return {
            v: AESGCM(self._sealing_key(self._u, v)).encrypt(
                _NONCE, masking[v] + self_mask[v], None
            )
            for v in places
            if v != self._u
        }

    def _check_keys(self, keys: Mapping[int, bytes]) -> None:
        order = self.roster.order
        if keys.get(self._u) != self._own:
            raise self._abort("its own keys were exchanged, or left out")
        for member, told in keys.items():
            if not 0 < member <= len(order) or len(told) != _KEYS:
                raise self._abort(f"keys of nobody in the roster, or malformed ones: {member}")
            signed = self._signed_keys(member, told[:64])
            if not _is_signed(self.roster.members[order[member - 1]], told[64:], signed):
                raise self._abort(
                    f"the keys of {order[member - 1]!r} are not signed by it for this round, these "
                    "numbers and this model"
                )
        public = [part for told in keys.values() for part in (told[:32], told[32:64])]
        if len(set(public)) != len(public):
            raise self._abort("two members have the same key")
        self._check_count(keys, "have said their keys")
        if self.numbers.threshold < least_threshold(len(keys)):
            raise self._abort(
                f"a threshold of {self.numbers.threshold} is below {least_threshold(len(keys))} "
                f"for {len(keys)} members"
            )

    @property
    def _needed(self) -> int:
        """Members that have to be there in every round."""
        roster = self.roster
        return max(self.numbers.threshold, roster.min_members, roster.max_colluders + 2)

    def _check_count(
        self, members: Iterable[int], what: str, least: int = 0, missing: Sequence[str] = ()
    ) -> None:
        count, needed = len(list(members)), max(self._needed, least)
        if count < needed:
            raise self._abort(f"{count} members {what}, and {needed} are needed", missing)

    def _sealing_key(self, sender: int, receiver: int) -> bytes:
        assert self._sealing is not None
        other = receiver if sender == self._u else sender
        if other not in self._agreed:  # once for both directions
            try:
                public = X25519PublicKey.from_public_bytes(self._u1[other][0])
                self._agreed[other] = self._sealing.exchange(public)
            except ValueError:  # a point of low order
                (name,) = self._names([other])
                raise self._abort(f"the key of {name!r} is none", [name]) from None
        info = self._context + b"share" + struct.pack(">HH", sender, receiver)
        return _derive(self._agreed[other], info)

    def open(self, sealed: Mapping[int, bytes]) -> list[int]:
        """Round 2: numbers of those with whom this member does not go on.

        What they have sealed cannot be opened, or the key to their pairwise masks is none.

        Args:
            sealed: from each other member that has shared its secrets, what is for this one.
        """
        self._take(2)
        if not set(sealed) < set(self._u1) or self._u in sealed:
            raise self._abort("shares of who has said no keys, or of itself")
        assert self._masking is not None
        for member, box in sealed.items():
            public = X25519PublicKey.from_public_bytes(self._u1[member][1])
            try:
                self._pairs[member] = self._masking.exchange(public)
                self._shares[member] = self._opened(member, box)
            except (InvalidTag, ValueError):  # ValueError: a point of low order
                self._pairs.pop(member, None)
        failed = sorted(set(sealed) - set(self._shares))
        self._check_kept(failed)
        return failed

    def _opened(self, member: int, box: bytes) -> bytes:
        if len(box) != _SEALED:
            raise InvalidTag
        return AESGCM(self._sealing_key(member, self._u)).decrypt(_NONCE, box, None)

    def _check_kept(self, failed: Sequence[int] = ()) -> None:
        names = self._names(failed)
        what = "are left"
        if names:
            what += f" without {', '.join(names)}, of whom it cannot open what they have sealed"
        roster = self.roster
        apart = len(self._u1) + roster.max_colluders + 1 - self.numbers.threshold
        self._check_count(self._shares, what, apart, names)

    def mask(
        self, members: Sequence[int], vector: Vector, remember: Callable[[int, int], None]
    ) -> Vector:
        """Round 3: the vector, masked; made in its memory.

        Args:
            members: U2: numbers of those who go on, this one too.
            vector: what is contributed; it is used up.
            remember: told of round and attempt before anything is given away, here and in round
                5; what it writes has to be ``last_round`` from then on, after a restart, too.
        """
        self._take(3)
        u2 = frozenset(members)
        if len(u2) != len(members) or not u2 <= set(self._shares) or self._u not in u2:
            raise self._abort("it is told to go on with others than it has shares of")
        self._shares = {member: self._shares[member] for member in sorted(u2)}
        self._check_kept()
        if vector.dtype != np.uint32 or vector.shape != (self.numbers.length,):
            raise self._abort(
                f"{vector.shape[0]} elements of {vector.dtype}, where {self.numbers.length} "
                "elements of the ring are agreed"
            )
        self._remember = remember
        self._note(self.numbers.attempt)
        add_mask(vector, _derive(self._self_mask, self._context + b"self"))
        for member in u2 - {self._u}:
            key = _derive(self._pairs[member], _pair_info(self._context, self._u, member))
            add_mask(vector, key, 1 if member > self._u else -1)
        return vector

    def _note(self, attempt: int) -> None:
        assert self._remember is not None
        with self._refusing():
            self._remember(self.numbers.round, attempt)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What the caller's own rules refuse ends this member's part."""
        try:
            yield
        except ValueError as error:
            raise self._abort(str(error)) from None
        except BaseException:
            self._abort("the round could not be noted")
            raise

    def _approve(self, *, leaving: bool) -> None:
        if self.approve is not None:
            with self._refusing():
                self.approve(self._names(sorted(self._u3)), leaving)

    def confirm(self, u3: Iterable[int]) -> bytes:
        """Round 4: a signature under who is in the sum.

        Args:
            u3: numbers of those whose masked vector has come.
        """
        self._take(4)
        u3 = list(u3)
        self._u3 = frozenset(u3)
        if len(self._u3) != len(u3) or not self._u3 <= set(self._shares) or self._u not in u3:
            raise self._abort("the sum is said to be of others than have shared their secrets")
        self._check_count(u3, "are in the sum")
        self._approve(leaving=False)
        return self.key.sign(self._signed_sum(self._u3))

    def _signed_sum(self, u3: Iterable[int]) -> bytes:
        return self._context + b"\x03" + _who(u3)

    def unmask(self, signatures: Mapping[int, bytes]) -> dict[int, bytes]:
        """Round 5: for each other of U2 one share, and the end of this member's part.

        Args:
            signatures: of round 4, by number.

        Returns:
            By number: of those in the sum a share of the self-mask, of the others of the key to
            their pairwise masks.
        """
        self._take(5)
        order, signed = self.roster.order, self._signed_sum(self._u3)
        valid = (
            member
            for member, signature in signatures.items()
            if member in self._u3
            and _is_signed(self.roster.members[order[member - 1]], signature, signed)
        )
        # To check a signature takes 0.1 ms: no more than have to be there.
        enough = list(islice(valid, self._needed))
        self._check_count(enough, "have signed that the sum is of the same members")
        self._approve(leaving=True)
        # No other attempt at this round: two sums of it may differ by one member.
        self._note(_LAST_ATTEMPT)
        given = {
            member: both[SHARE_BYTES:] if member in self._u3 else both[:SHARE_BYTES]
            for member, both in self._shares.items()
        }
        self._forget()
        return given


# --- who adds up ---------------------------------------------------------------------------------


class Collector:
    """Who adds up, in one round. What members say is checked as far as it can be.

    Args:
        roster: of the members.
        numbers: of the round.
        model: SHA-256 of the model that the members were given.
    """

    def __init__(self, roster: Roster, numbers: Numbers, model: bytes) -> None:
        self.roster, self.numbers = roster, numbers
        self._context = _context(roster, numbers, model)
        self._keys: dict[int, bytes] = {}
        self._sealed: dict[int, Mapping[int, bytes]] = {}
        self._failed: dict[int, frozenset[int]] = {}
        self._sum: Vector = np.zeros(numbers.length, np.uint32)
        self._u1: frozenset[int] = frozenset()
        self._u2: frozenset[int] = frozenset()
        self._u3: frozenset[int] = frozenset()
        self._masked: set[int] = set()
        self._signatures: dict[int, bytes] = {}
        self._shares: dict[int, Mapping[int, bytes]] = {}

    def number_of(self, name: str) -> int:
        """Of a member, from 1."""
        return self.roster.order.index(name) + 1

    def _names(self, members: Iterable[int]) -> list[str]:
        return [self.roster.order[each - 1] for each in sorted(members)]

    def _close(self, there: Iterable[int], before: Iterable[int], what: str) -> frozenset[int]:
        there = frozenset(there)
        roster = self.roster
        needed = max(self.numbers.threshold, roster.min_members, roster.max_colluders + 2)
        if len(there) < needed:
            missing = self._names(set(before) - there)
            raise SecAggAborted(
                self.numbers.round, f"{len(there)} members {what}, {needed} are needed", missing
            )
        return there

    def add_keys(self, member: int, told: bytes) -> None:
        """Round 0: what a member said."""
        self._keys[member] = told

    def all_keys(self) -> dict[int, bytes]:
        """Round 0 is closed: for every member of U1.

        Raises:
            SecAggAborted: too few are there, as at the end of each round.
        """
        everyone = range(1, len(self.roster.members) + 1)
        self._u1 = self._close(self._keys, everyone, "have said their keys")
        return dict(self._keys)

    def add_shares(self, member: int, sealed: Mapping[int, bytes]) -> None:
        """Round 1: what a member has sealed for the others."""
        if member not in self._u1 or set(sealed) != self._u1 - {member}:
            raise SecAggAborted(
                self.numbers.round, f"{self._names([member])[0]} has not sealed for all members"
            )
        self._sealed[member] = sealed

    def shares_for(self) -> dict[int, dict[int, bytes]]:
        """Round 1 is closed: for each member of U2 what the others of U2 have sealed for it."""
        shared = self._close(self._sealed, self._u1, "have shared their secrets")
        return {v: {u: sealed[v] for u, sealed in self._sealed.items() if u != v} for v in shared}

    def add_opened(self, member: int, failed: Iterable[int]) -> None:
        """Round 2: whose shares a member could not open."""
        failed = frozenset(failed)
        if member not in self._sealed or not failed <= set(self._sealed) - {member}:
            raise SecAggAborted(
                self.numbers.round, f"{self._names([member])[0]} tells of shares it was not given"
            )
        self._failed[member] = failed

    def members_that_mask(self) -> tuple[list[int], dict[str, str]]:
        """Round 2 is closed: U2, and why others that have answered are not in it, by name.

        Who has sealed rubbish, and who only says so of another, cannot be told apart; so of those
        that cannot go on together the one goes that most of them cannot go on with.
        """
        left, dropped = set(self._failed), dict[str, str]()
        while pairs := [(u, v) for u in sorted(left) for v in sorted(self._failed[u] & left)]:
            worst = max(left, key=lambda each: _complaints(pairs, each))
            left.remove(worst)
            others = {u if v == worst else v for u, v in pairs if worst in (u, v)}
            dropped[self._names([worst])[0]] = (
                "shares between it and " + ", ".join(self._names(others)) + " cannot be opened"
            )
        self._u2 = self._close(left, self._sealed, "can open each other's shares")
        return sorted(self._u2), dropped

    def add_masked(self, member: int, vector: Vector) -> None:
        """Round 3: a masked vector; it is added and not kept."""
        if member not in self._u2 or member in self._masked or vector.shape != self._sum.shape:
            raise SecAggAborted(
                self.numbers.round, f"{self._names([member])[0]} has sent a vector that is not due"
            )
        self._masked.add(member)
        np.add(self._sum, vector, out=self._sum)

    def members_of_sum(self) -> list[int]:
        """Round 3 is closed: U3."""
        self._u3 = self._close(self._masked, self._u2, "have sent their vectors")
        return sorted(self._u3)

    def add_signature(self, member: int, signature: bytes) -> None:
        """Round 4: what a member has signed."""
        signed = self._context + b"\x03" + _who(self._u3)
        name = self.roster.order[member - 1]
        if member in self._u3 and _is_signed(self.roster.members[name], signature, signed):
            self._signatures[member] = signature

    def all_signatures(self) -> dict[int, bytes]:
        """Round 4 is closed: for those that are left."""
        self._close(self._signatures, self._u3, "have signed who is in the sum")
        return dict(self._signatures)

    def add_unmasking(self, member: int, shares: Mapping[int, bytes]) -> None:
        """Round 5: a member's shares."""
        if member not in self._signatures or set(shares) != self._u2:
            raise SecAggAborted(
                self.numbers.round,
                f"{self._names([member])[0]} has given other shares than are due",
            )
        self._shares[member] = shares

    def total(self) -> tuple[Vector, list[str]]:
        """The sum, modulo 2 ** 32, and who is in it.

        Raises:
            SecAggAborted: too few members have given their shares, or these do not fit together.
        """
        if len(self._shares) < self.numbers.threshold:
            raise SecAggAborted(
                self.numbers.round,
                f"{len(self._shares)} members have given shares, "
                f"{self.numbers.threshold} are needed",
                self._names(self._u3 - set(self._shares)),
            )
        chosen = dict(list(self._shares.items())[: self.numbers.threshold])
        members = sorted(self._u2)
        try:
            secrets = restore({v: [told[u] for u in members] for v, told in chosen.items()})
        except ValueError as error:
            raise SecAggAborted(self.numbers.round, f"shares do not fit: {error}") from None
        for member, secret in zip(members, secrets, strict=True):
            if member in self._u3:
                add_mask(self._sum, _derive(secret, self._context + b"self"), -1)
            else:
                self._take_pairs(member, secret)
        return self._sum, self._names(self._u3)

    def _take_pairs(self, lost: int, secret: bytes) -> None:
        """Take away what masks with a lost member have left in the sum."""
        masking = X25519PrivateKey.from_private_bytes(secret)
        if masking.public_key().public_bytes_raw() != self._keys[lost][32:64]:
            raise SecAggAborted(
                self.numbers.round, f"the shares of {self._names([lost])[0]}'s key are not its own"
            )
        for member in self._u3:
            other = X25519PublicKey.from_public_bytes(self._keys[member][32:64])
            key = _derive(masking.exchange(other), _pair_info(self._context, lost, member))
            add_mask(self._sum, key, -1 if lost > member else 1)
