"""A threshold of shares restores a secret, and one fewer fits every secret."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsfed.privacy import shamir
from wsfed.privacy.shamir import PRIME, SHARE_BYTES, restore, split

SECRET = bytes(range(32))


def _at(coefficients: Sequence[int], place: int) -> int:
    """The polynomial as it is written in a textbook."""
    return sum(c * place**power for power, c in enumerate(coefficients)) % PRIME


def _through(points: dict[int, int], place: int) -> int:
    """The polynomial of the lowest degree through these points, at a place (Lagrange)."""
    total = 0
    for one, value in points.items():
        for other in points:
            if other != one:
                value = value * (place - other) * pow(one - other, -1, PRIME) % PRIME
        total += value
    return total % PRIME


@st.composite
def _thresholds(draw: st.DrawFn) -> tuple[int, int]:
    count = draw(st.integers(1, 20))
    return draw(st.integers(1, count)), count


def test_the_prime_is_the_smallest_above_all_secrets() -> None:
    """By Miller and Rabin; each number between has a witness, so it is composite."""

    def is_prime(number: int) -> bool:
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            powers = [pow(base, odd * 2**k, number) for k in range(twos)]
            if powers[0] != 1 and number - 1 not in powers:
                return False
        return True

    assert [n for n in range(2**256 + 1, PRIME + 1, 2) if is_prime(n)] == [PRIME]


@settings(deadline=None, max_examples=60)
@given(_thresholds(), st.binary(min_size=32, max_size=32), st.randoms(use_true_random=False))
def test_any_threshold_of_shares_restores_the_secret(
    numbers: tuple[int, int], secret: bytes, random: Random
) -> None:
    threshold, count = numbers
    places = random.sample(range(1, 1000), count)
    shares = split(secret, threshold, places)
    assert list(shares) == places and {len(share) for share in shares.values()} == {SHARE_BYTES}
    for size in (threshold, count):
        chosen = random.sample(places, size)
        assert restore({place: [shares[place]] for place in chosen}) == [secret]


def test_every_choice_of_shares_restores_the_secret() -> None:
    shares = split(SECRET, 4, range(1, 8))
    for chosen in combinations(shares, 4):
        assert restore({place: [shares[place]] for place in chosen}) == [SECRET]


@settings(deadline=None, max_examples=60)
@given(_thresholds(), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_one_share_fewer_fits_every_other_secret(
    numbers: tuple[int, int], secret: bytes, other: bytes
) -> None:
    """There is exactly one polynomial with these shares and any other secret at 0.

    Each polynomial is drawn with the same probability, so the shares tell nothing.
    """
    threshold, count = numbers
    shares = split(secret, threshold, range(1, count + 1))
    known = {place: int.from_bytes(shares[place], "big") for place in range(1, threshold)}
    known[0] = int.from_bytes(other, "big")
    # `threshold` points: a polynomial of a degree below it. Its share at a further place makes
    # the known shares restore the other secret.
    further = _through(known, threshold).to_bytes(SHARE_BYTES, "big")
    fake = {place: [shares[place]] for place in range(1, threshold)} | {threshold: [further]}
    assert restore(fake) == [other]


@pytest.mark.parametrize("threshold", [2, 3, 7])
def test_one_share_fewer_does_not_restore_the_secret(threshold: int) -> None:
    shares = split(SECRET, threshold, range(1, threshold + 1))
    few = {place: [shares[place]] for place in range(1, threshold)}
    try:
        assert restore(few) != [SECRET]  # but for one in 2 ** 256
    except ValueError:
        pass  # what comes out was above all secrets, by one in 2 ** 247


@pytest.mark.parametrize("secret", [bytes(32), bytes(31) + b"\x01", b"\xff" * 32])
@pytest.mark.parametrize("threshold", [1, 2, 5])
def test_the_smallest_and_the_largest_secrets_are_restored(secret: bytes, threshold: int) -> None:
    shares = split(secret, threshold, range(1, 6))
    assert restore({place: [shares[place]] for place in (5, 4, 3, 2, 1)[:threshold]}) == [secret]


def test_places_as_large_as_the_field_are_fine() -> None:
    places = [1, 2**64, PRIME - 1]
    shares = split(SECRET, 3, places)
    assert restore({place: [shares[place]] for place in places}) == [SECRET]


def test_known_coefficients_give_known_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    coefficients = [PRIME - 1, 2**200 + 3, 5]
    drawn, asked = iter(coefficients), []

    def randbelow(limit: int) -> int:
        asked.append(limit)
        return next(drawn)

    monkeypatch.setattr(secrets, "randbelow", randbelow)
    shares = split(SECRET, 4, [1, 2, 3, 100])
    monkeypatch.undo()
    assert asked == [PRIME] * 3  # the whole field, the highest power included
    whole = [int.from_bytes(SECRET, "big"), *coefficients]
    # The order in which they are drawn is no promise.
    assert {p: int.from_bytes(s, "big") for p, s in shares.items()} in (
        {p: _at(whole, p) for p in shares},
        {p: _at([whole[0], *reversed(coefficients)], p) for p in shares},
    )
    assert restore({p: [s] for p, s in shares.items()}) == [SECRET]


def test_known_shares_restore_a_known_secret() -> None:
    """Shared with the client in JavaScript: f(x) = secret + 7 x + 11 x ** 2."""
    shares = {
        1: "00000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e31",
        2: "00000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e59",
        5: "00000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1f55",
    }
    secret = int.from_bytes(SECRET, "big")
    assert {p: _at([secret, 7, 11], p) for p in shares} == {
        p: int(told, 16) for p, told in shares.items()
    }
    assert restore({p: [bytes.fromhex(told)] for p, told in shares.items()}) == [SECRET]


def test_many_secrets_are_restored_at_once_in_their_order() -> None:
    told = [bytes([each]) * 32 for each in range(5)]
    shares = [split(secret, 3, range(1, 5)) for secret in told]
    assert restore({place: [each[place] for each in shares] for place in (2, 4, 1)}) == told


def test_the_same_secret_has_other_shares_each_time() -> None:
    one, other = (split(SECRET, 2, [1, 2]) for _ in range(2))
    assert all(one[place] != other[place] for place in one)


def test_shares_of_others_are_refused_where_no_secret_comes_out() -> None:
    """The field is hardly larger than the secrets, so it takes shares made for this."""
    # f(x) = PRIME - 1 + x: its value at 0 is above every secret.
    shares = {place: [(place - 1).to_bytes(SHARE_BYTES, "big")] for place in (1, 2)}
    with pytest.raises(ValueError, match="do not belong together"):
        restore(shares)


def test_shares_of_others_do_not_restore_the_secret() -> None:
    one, other = split(SECRET, 2, [1, 2]), split(SECRET, 2, [1, 2])
    try:
        assert restore({1: [one[1]], 2: [other[2]]}) != [SECRET]
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("secret", "threshold", "places", "says"),
    [
        (bytes(31), 1, [1], "32 bytes, not 31"),
        (bytes(33), 1, [1], "32 bytes, not 33"),
        (SECRET, 0, [1], "no threshold of 0"),
        (SECRET, -1, [1], "no threshold of -1"),
        (SECRET, 3, [1, 2], "2 shares have no threshold of 3"),
        (SECRET, 1, [], "0 shares"),
        (SECRET, 2, [1, 1], "distinct and positive"),
        (SECRET, 2, [0, 1], "distinct and positive"),
        (SECRET, 2, [-1, 1], "distinct and positive"),
        (SECRET, 2, [1, PRIME], "distinct and positive"),
    ],
)
def test_what_cannot_be_split_is_refused(
    secret: bytes, threshold: int, places: list[int], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        split(secret, threshold, places)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({}, "distinct"),
        ({1: [bytes(33)], 2: []}, "a share of each secret"),
        ({1: [bytes(32)]}, "33 bytes"),
        ({1: [bytes(34)]}, "33 bytes"),
        ({1: [b""]}, "33 bytes"),
        ({1: [PRIME.to_bytes(33, "big")]}, "below the prime"),
        ({1: [b"\xff" * 33]}, "below the prime"),
    ],
)
def test_what_cannot_be_restored_is_refused(shares: dict[int, list[bytes]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        restore(shares)


def test_the_module_draws_from_the_system() -> None:
    """Not from a generator that can be predicted."""
    assert shamir.secrets is secrets
