"""Secrets in shares, of which ``threshold`` restore one and fewer tell nothing (Shamir 1979).

Secrets are 256 bits, so the field is that of the smallest prime above: 2 ** 256 + 297.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Final

__all__ = ["PRIME", "SHARE_BYTES", "restore", "split"]

PRIME: Final = 2**256 + 297
#: One more than a secret: elements of the field have 257 bits.
SHARE_BYTES: Final = 33


def split(secret: bytes, threshold: int, places: Sequence[int]) -> dict[int, bytes]:
    """Shares of a secret.

    Args:
        secret: 32 bytes.
        threshold: shares that restore it.
        places: where the polynomial is evaluated, distinct and not 0; one share each.

    Returns:
        33 bytes for each place.

    Raises:
        ValueError: an argument is not of that kind.
    """
    if len(secret) != 32:
        raise ValueError(f"a secret has 32 bytes, not {len(secret)}")
    if not 1 <= threshold <= len(places):
        raise ValueError(f"{len(places)} shares have no threshold of {threshold}")
    if len(set(places)) != len(places) or any(not 0 < place < PRIME for place in places):
        raise ValueError("places have to be distinct and positive")
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.reverse()
    shares = {}
    for place in places:
        value = 0
        for coefficient in coefficients:  # places are small: to reduce once is three times as fast
            value = value * place + coefficient
        shares[place] = (value % PRIME).to_bytes(SHARE_BYTES, "big")
    return shares


def restore(shares: Mapping[int, Sequence[bytes]]) -> list[bytes]:
    """Secrets from their shares: as many as each place has shares.

    Args:
        shares: by place, of at least ``threshold`` places: one share of each secret, in one order.

    Returns:
        32 bytes for each secret.

    Raises:
        ValueError: a share is malformed, or what comes out is no secret: shares of others are among
            them, or too few.
    """
    places = list(shares)
    weights = _weights_at_zero(places)
    count = {len(each) for each in shares.values()}
    if len(count) != 1:
        raise ValueError("each place needs a share of each secret")
    found = []
    for secret in range(count.pop()):
        value = 0
        for place, weight in zip(places, weights, strict=True):
            value += _element(shares[place][secret]) * weight
        value %= PRIME
        if value >= 2**256:
            raise ValueError("these shares do not belong together")
        found.append(value.to_bytes(32, "big"))
    return found


def _element(share: bytes) -> int:
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ValueError("a share is 33 bytes of a number below the prime")
    return value


def _weights_at_zero(places: Sequence[int]) -> list[int]:
    """Lagrange's: the value at 0 is the sum of value times weight."""
    if not places or len(set(places)) != len(places):
        raise ValueError("places have to be distinct")
    weights = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights
