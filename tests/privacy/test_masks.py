"""Masks are taken away again exactly, and quantised numbers add up without wrapping around."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from wsfed.privacy.masks import add_mask, add_noise, dequantise, quantise, scale_of

KEY = bytes(range(32))
PART = 2**15
#: Shared with the client in JavaScript: the first words of KEY's mask, of little end first.
WORDS = [
    *(0xB60090F2, 0xD09F492A, 0x6A9AF3A9, 0x80772EDD),
    *(0xAE765DF0, 0xE59FB94A, 0x319BF6A6, 0x3D36C248),
]
LENGTHS = st.one_of(
    st.integers(0, 9),
    st.integers(PART - 5, PART + 5),
    st.integers(2 * PART - 5, 2 * PART + 5),
)


def _encrypted_zeros(key: bytes, length: int) -> list[int]:
    cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()
    told = cipher.update(bytes(4 * length)) + cipher.finalize()
    return np.frombuffer(told, "<u4").tolist()


# --- masks ---------------------------------------------------------------------------------------


def test_a_known_key_has_a_known_mask() -> None:
    vector = np.zeros(8, np.uint32)
    add_mask(vector, KEY)
    assert vector.tolist() == WORDS == _encrypted_zeros(KEY, 8)


@pytest.mark.parametrize("length", [1, 3, PART - 1, PART, PART + 1, 3 * PART + 7])
def test_a_mask_is_what_the_cipher_makes_of_zeros(length: int) -> None:
    vector = np.zeros(length, np.uint32)
    add_mask(vector, KEY)
    assert vector.tolist() == _encrypted_zeros(KEY, length)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.binary(min_size=32, max_size=32), st.integers(0, 2**32), st.booleans())
def test_a_mask_is_taken_away_again(length: int, key: bytes, seed: int, first: bool) -> None:
    values = np.random.default_rng(seed).integers(0, 2**32, length, dtype=np.uint32)
    vector = values.copy()
    add_mask(vector, key, 1 if first else -1)
    assert length < 4 or not np.array_equal(vector, values)
    add_mask(vector, key, -1 if first else 1)
    assert np.array_equal(vector, values)


def test_masks_add_up_modulo_two_to_the_32() -> None:
    vector = np.full(8, 2**32 - 1, np.uint32)
    add_mask(vector, KEY)
    assert vector.tolist() == [(2**32 - 1 + word) % 2**32 for word in WORDS]
    vector = np.zeros(8, np.uint32)
    add_mask(vector, KEY, -1)
    assert vector.tolist() == [-word % 2**32 for word in WORDS]


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_what_is_no_key_makes_no_mask(key: bytes) -> None:
    vector = np.zeros(4, np.uint32)
    with pytest.raises(ValueError):
        add_mask(vector, key)
    assert not vector.any()


def test_masks_of_different_keys_share_no_structure() -> None:
    """2 ** 16 first words fall together as often as random ones do: 0.5 pairs are expected.

    Nine or more would come once in ten billion runs, if it were chance; the keys are counted, so
    that each run finds the same.
    """
    count = 2**16
    firsts = np.zeros(count, np.uint32)
    for number in range(count):
        add_mask(firsts[number : number + 1], number.to_bytes(32, "big"))
    assert count - len(np.unique(firsts)) <= 8
    # Each bit is set in half of them, within six standard deviations.
    bits = np.unpackbits(firsts.view(np.uint8)).reshape(count, 32).sum(axis=0)
    assert (np.abs(bits.astype(int) - count // 2) < 6 * math.sqrt(count) / 2).all()


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("members", "bits"), [(3, 30), (4, 30), (5, 29), (100, 25), (128, 25)])
def test_members_leave_room_for_their_sum(members: int, bits: int) -> None:
    assert scale_of(members, 1.0) == 2 ** (bits - 1) - 1
    assert scale_of(members, 4.0) == (2 ** (bits - 1) - 1) / 4
    assert members * (2 ** (bits - 1) - 1) < 2**31


@pytest.mark.parametrize("members", [3, 100, 128])
@pytest.mark.parametrize("bound", [1.0, 0.01, 37.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_is_off_by_less_than_a_step_of_each_member(
    members: int, bound: float, dtype: type
) -> None:
    generator = np.random.default_rng(members)
    values = generator.uniform(-bound, bound, (members, 500)).astype(dtype)
    values = np.clip(values, dtype(-bound), dtype(bound))
    total = np.zeros(500, np.uint32)
    for each in values:
        total += quantise(each, members, bound)
    error = dequantise(total, members, bound) - values.astype(np.float64).sum(axis=0)
    step = 1 / scale_of(members, bound)
    # A value may be rounded beyond float32's bound; the last part is that of this sum itself.
    assert np.abs(error).max() <= members * (step + 1e-7 * bound)
    # Steps are rounded independently: their mean is that of n uniform ones, with room.
    assert np.abs(error).std() < math.sqrt(members) * step


@pytest.mark.parametrize("members", [1, 3, 100, 128])
@pytest.mark.parametrize("bound", [1.0, 0.1, 1e-8, 1e8])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_members_at_the_bound_do_not_overflow(
    members: int, bound: float, sign: int, dtype: type
) -> None:
    values = np.full(64, sign * bound, dtype)
    total = np.zeros(64, np.uint32)
    for _ in range(members):
        total += quantise(values, members, bound)
    # float32's own error of a bound, and one step a member.
    near = 1e-6 + 2 / scale_of(members, 1.0)
    assert dequantise(total, members, bound) == pytest.approx(sign * members * bound, rel=near)


def test_a_value_between_two_steps_is_right_in_the_mean() -> None:
    members, count = 100, 200_000
    step = 1 / scale_of(members, 1.0)
    for part in (0.25, 0.5, 0.9, -0.3):
        values = np.full(count, (1000 + part) * step)
        found = quantise(values, members, 1.0).view(np.int32)
        low = math.floor(1000 + part)
        assert set(found.tolist()) == {low, low + 1}
        # Six standard deviations: once in a billion runs.
        spread = math.sqrt((part % 1) * (1 - part % 1) / count)
        assert abs(found.mean() - (1000 + part)) < 6 * spread + 1e-6


def test_what_lies_on_a_step_stays_there() -> None:
    steps = np.array([0, 1, -1, 1000, -1000, 2**20, -(2**20)])
    bound = float(2**24 - 1)  # a step is 1
    assert scale_of(100, bound) == 1.0
    for _ in range(20):
        assert np.array_equal(quantise(steps.astype(float), 100, bound).view(np.int32), steps)


def test_vectors_longer_than_a_part_are_quantised_whole() -> None:
    values = np.linspace(-1, 1, 2 * PART + 3)
    found = dequantise(quantise(values, 3, 1.0), 3, 1.0)
    assert np.abs(found - values).max() <= 1 / scale_of(3, 1.0)
    assert len(quantise(np.empty(0), 3, 1.0)) == 0


def test_two_quantisations_are_rounded_differently() -> None:
    values = np.full(1000, 0.123456789)
    assert not np.array_equal(quantise(values, 100, 1.0), quantise(values, 100, 1.0))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (math.nan, "not finite"),
        (math.inf, "not finite"),
        (-math.inf, "not finite"),
        (1.001, "beyond the bound of 1.0"),
        (-1.001, "beyond the bound of 1.0"),
        (1e30, "beyond the bound"),
        (-1e30, "beyond the bound"),
    ],
)
@pytest.mark.parametrize("place", [0, PART + 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_would_wrap_around_is_refused(
    value: float, says: str, place: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.zeros(PART + 2, dtype)
    values[place] = value

    def draw() -> np.random.Generator:
        raise AssertionError("it is refused before anything is made")

    monkeypatch.setattr("wsfed.privacy.masks.unforeseeable", draw)
    with pytest.raises(ValueError, match=says):
        quantise(values, 3, 1.0)


def test_a_rounding_beyond_the_bound_is_cut_off() -> None:
    beyond = np.array([1 + 5e-7, -1 - 5e-7])
    limit = 2**29 - 1
    assert quantise(beyond, 3, 1.0).view(np.int32).tolist() == [limit, -limit]


def test_values_are_not_changed() -> None:
    values = np.linspace(-1, 1, 10)
    before = values.copy()
    quantise(values, 3, 1.0)
    assert np.array_equal(values, before)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_bound_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="cannot be added in 32 bits"):
        scale_of(3, bound)


def test_more_members_than_leave_bits_are_refused() -> None:
    assert scale_of(2**24, 1.0) == 127
    with pytest.raises(ValueError, match="cannot be added in 32 bits"):
        scale_of(2**24 + 1, 1.0)


# --- noise ---------------------------------------------------------------------------------------


def test_noise_has_its_deviation_and_no_mean() -> None:
    count = 3 * PART + 7
    values = np.full(count, 0.5)
    add_noise(values, 0.25, 10.0)
    noise = values - 0.5
    # Six standard deviations of each figure: once in a billion runs.
    assert abs(noise.mean()) < 6 * 0.25 / math.sqrt(count)
    assert abs(noise.std() - 0.25) < 6 * 0.25 / math.sqrt(2 * count)
    assert len(np.unique(noise)) > count - 10  # each element has its own, in every part


def test_noise_stays_within_its_reach() -> None:
    values = np.array([1.0, -1.0] * 1000)
    add_noise(values, 5.0, 1.5)
    assert values.max() == 1.5 and values.min() == -1.5
    assert len(quantise(values, 100, 1.5)) == 2000


def test_no_noise_changes_nothing() -> None:
    values = np.linspace(-1, 1, 9)
    add_noise(values, 0.0, 1.0)
    assert np.array_equal(values, np.linspace(-1, 1, 9))


def test_noise_is_another_each_time() -> None:
    one, other = np.zeros(100), np.zeros(100)
    add_noise(one, 1.0, 9.0)
    add_noise(other, 1.0, 9.0)
    assert not np.intersect1d(one, other).size
