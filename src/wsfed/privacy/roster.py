"""Who may add up with whom: a list that the owners of the data sign, and each member pins.

It comes to the members out of band, not from who adds up. Without one a round is against curious
parties only: who adds up could invent members.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from wsfed.privacy.cohorts import CohortPolicy
from wsfed.privacy.journal import Journal

__all__ = [
    "Membership",
    "Roster",
    "SignedRoster",
    "load_roster",
    "new_key",
    "public_key",
    "save_roster",
]

_KEY: Final = re.compile("[0-9a-f]{64}")
_FORM: Final = "wsfed-roster/1"
#: The graph of masks is complete; a sparse one needs a proof that has not been checked.
MOST_MEMBERS: Final = 128


@dataclass(frozen=True, slots=True)
class Roster:
    """Members, and the numbers below which none of them takes part.

    Attributes:
        id: of this list.
        epoch: grows with each change of it.
        members: public Ed25519 keys (32 bytes, hex), by the ids of the workers.
        min_members: that have to be in a sum.
        max_colluders: members that may work together against others: so many fewer than the sum's
            members leave at least two.
        min_rows: that each member trains on, at least.
        bound: a change is clipped to this L2 norm before it is added.
        max_weight: rows count up to so many.
        noise: standard deviation of the noise in the sum of ``min_members`` or more, that of
            colluders not counted, in units of ``bound``: each member adds its part before it masks.
        round_rate: rounds, of all sessions and attempts, in which a member gives a masked vector in
            ``rate_seconds``, at most.
        rate_seconds: of ``round_rate``; a day.
        arch_hash: structure of the model (:func:`~wsfed.privacy.structure.structure_of`), 32 bytes
            in hexadecimal digits; empty: any.
    """

    id: str
    epoch: int
    members: Mapping[str, str]
    min_members: int = 3
    max_colluders: int = 1
    min_rows: int = 32
    bound: float = 1.0
    max_weight: int = 1_000_000
    noise: float = 0.0
    round_rate: int = 1_000
    rate_seconds: int = 86_400
    arch_hash: str = ""

    def __post_init__(self) -> None:
        names, keys = list(self.members), set(self.members.values())
        if not 3 <= len(names) <= MOST_MEMBERS or len(keys) != len(names):
            raise ValueError(
                f"a roster has 3 to {MOST_MEMBERS} members (of two, each would learn the other's "
                f"value), each with a key of its own: {len(names)} members, {len(keys)} keys"
            )
        if any(not _KEY.fullmatch(key) for key in keys):
            raise ValueError("a public key has 32 bytes, in hexadecimal digits")
        if not 3 <= self.min_members <= len(names):
            raise ValueError(f"min_members is between 3 and {len(names)}, not {self.min_members}")
        if not 0 <= self.max_colluders <= self.min_members - 2:
            raise ValueError(
                f"max_colluders is between 0 and min_members - 2 = {self.min_members - 2}, "
                f"not {self.max_colluders}"
            )
        if (
            self.min_rows < 1
            or not 0 < self.bound < float("inf")
            or not 0 <= self.noise < float("inf")
        ):
            raise ValueError(
                f"out of range: min_rows {self.min_rows}, bound {self.bound}, noise {self.noise}"
            )
        if self.arch_hash and not _KEY.fullmatch(self.arch_hash):
            raise ValueError("arch_hash has 32 bytes, in hexadecimal digits, or is empty")
        if self.round_rate < 1 or self.rate_seconds < 1:
            raise ValueError(
                f"out of range: round_rate {self.round_rate} in {self.rate_seconds} seconds"
            )
        if not 1 <= self.max_weight * len(names) < 2**31:
            raise ValueError(
                f"max_weight {self.max_weight} × {len(names)} members is above 2 ** 31"
            )

    @property
    def order(self) -> list[str]:
        """The members, sorted: a member's number is its place, from 1."""
        return sorted(self.members)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise that one member adds; colluders know their own."""
        return float(self.noise * self.bound / (self.min_members - self.max_colluders) ** 0.5)

    @property
    def reach(self) -> float:
        """No value of one member is larger: its noise is cut off at eight deviations."""
        return self.bound + 8 * self.deviation

    @property
    def packed(self) -> bytes:
        """What is signed and hashed: JSON with sorted keys."""
        told = {"form": _FORM, **asdict(self), "members": dict(self.members)}
        return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()

    @property
    def hash(self) -> bytes:
        """SHA-256 of :attr:`packed`."""
        return hashlib.sha256(self.packed).digest()

    def sign(self, owner: Ed25519PrivateKey) -> SignedRoster:
        """With the key of who owns the data."""
        return SignedRoster(self, owner.sign(self.packed).hex())


@dataclass(frozen=True, slots=True)
class SignedRoster:
    """A roster, and its owner's signature."""

    roster: Roster
    signature: str

    def check(self, owner: str) -> Roster:
        """The roster, if this owner has signed it.

        Args:
            owner: public key, in hexadecimal digits.

        Raises:
            ValueError: the signature is not the owner's.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(owner))
            key.verify(bytes.fromhex(self.signature), self.roster.packed)
        except (InvalidSignature, ValueError):
            raise ValueError(
                f"the roster {self.roster.id!r} is not signed by the owner {owner[:16]}…"
            ) from None
        return self.roster


@dataclass(frozen=True, slots=True)
class Membership:
    """What a worker needs to be a member.

    Attributes:
        name: of this member in the roster.
        key: that it signs with.
        roster: pinned by its owner.
        journal: of the rounds in which it took part, and of the sums that it has helped to unmask.
        cohorts: what the worker's owner lets be told by the difference of two sums.
        most_alike: share of a layer's rows that may be alike
            (:func:`~wsfed.privacy.structure.check_rows`); 1 where these are not looked at.
    """

    name: str
    key: Ed25519PrivateKey
    roster: Roster
    journal: Journal = field(default_factory=Journal)
    cohorts: CohortPolicy = field(default_factory=CohortPolicy)
    most_alike: float = 0.01

    def __post_init__(self) -> None:
        if self.roster.members.get(self.name) != public_key(self.key):
            raise ValueError(
                f"the roster {self.roster.id!r} has no member {self.name!r} with this key"
            )


def new_key() -> Ed25519PrivateKey:
    """A key that signs: an owner's or a member's."""
    return Ed25519PrivateKey.generate()


def public_key(key: Ed25519PrivateKey) -> str:
    """Its public half, in hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def save_roster(path: str | Path, signed: SignedRoster) -> None:
    """Write it as JSON."""
    told = {"roster": json.loads(signed.roster.packed), "signature": signed.signature}
    Path(path).write_text(json.dumps(told, indent=2) + "\n")


def load_roster(path: str | Path) -> SignedRoster:
    """Read what :func:`save_roster` wrote; its signature is not looked at here.

    Raises:
        ValueError: it is no roster.
        OSError: it cannot be read.
    """
    try:
        told: dict[str, Any] = json.loads(Path(path).read_text())
        roster = dict(told["roster"])
        if roster.pop("form") != _FORM:
            raise ValueError(f"it is not of the form {_FORM}")
        return SignedRoster(Roster(**roster), str(told["signature"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no roster: {error}") from None
