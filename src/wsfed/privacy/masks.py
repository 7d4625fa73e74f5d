"""Vectors in a ring of 32 bits: numbers become integers that add up, and masks that look random.

A value in ``[-bound, bound]`` becomes an integer of two's complement, of so few bits that the sum
over all members fits into 32. What is added modulo 2 ** 32 can be taken away again exactly.
"""

from __future__ import annotations

import math
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from wsfed.privacy.noise import unforeseeable

__all__ = ["Vector", "add_mask", "add_noise", "dequantise", "quantise", "scale_of"]

#: Of the ring of integers modulo 2 ** 32.
Vector: TypeAlias = npt.NDArray[np.uint32]

#: Elements of a mask that are made at a time, so that they stay in the processor's cache.
_PART: Final = 2**15
_ZEROS: Final = bytes(4 * _PART)


def scale_of(members: int, bound: float) -> float:
    """What a value is multiplied with before it is rounded.

    Args:
        members: of whom the integers are added up.
        bound: the largest absolute value.

    Raises:
        ValueError: no bound, or so many members that no bits are left.
    """
    bits = 32 - math.ceil(math.log2(max(members, 1)))
    if not 0 < bound < math.inf or bits < 8:
        raise ValueError(f"{members} values of up to {bound} cannot be added in 32 bits")
    return (2.0 ** (bits - 1) - 1) / bound


def quantise(values: npt.NDArray[np.floating], members: int, bound: float) -> Vector:
    """Numbers as integers of the ring, rounded up or down at random, so that means are unbiased.

    Args:
        values: one dimension.
        members: see :func:`scale_of`.
        bound: see there.

    Raises:
        ValueError: a value is not finite, or beyond the bound; nothing wraps around.
    """
    # One rounding less than a value just at the bound may have gained in float32.
    largest = float(np.max(np.abs(values), initial=0.0))
    if not largest <= bound * (1 + 1e-6):
        raise ValueError(
            "a value is not finite"
            if not math.isfinite(largest)
            else f"a value of {largest} is beyond the bound of {bound}"
        )
    scale, limit = scale_of(members, bound), math.floor(scale_of(members, bound) * bound + 0.5)
    generator = unforeseeable()
    made = np.empty(len(values), np.uint32)
    for start in range(0, len(values), _PART):
        part = slice(start, start + _PART)
        scaled = values[part].astype(np.float64) * scale
        scaled += generator.random(len(scaled))
        whole = np.clip(np.floor(scaled), -limit, limit).astype(np.int32)
        made[part] = whole.view(np.uint32)
    return made


def add_noise(values: npt.NDArray[np.float64], deviation: float, reach: float) -> None:
    """Add Gaussian noise that nobody can foresee; in place.

    Args:
        values: one dimension.
        deviation: standard deviation of the noise.
        reach: values stay within ``[-reach, reach]``.
    """
    generator = unforeseeable()
    for start in range(0, len(values), _PART):
        part = values[start : start + _PART]
        part += generator.normal(0.0, deviation, len(part))
        np.clip(part, -reach, reach, out=part)


def dequantise(total: Vector, members: int, bound: float) -> npt.NDArray[np.float64]:
    """The sum of what :func:`quantise` made, as numbers.

    Args:
        total: in the ring.
        members: as it was quantised with; no more than so many were added up.
        bound: as it was quantised with.
    """
    return total.view(np.int32).astype(np.float64) / scale_of(members, bound)


def add_mask(vector: Vector, key: bytes, sign: int = 1) -> None:
    """Add what AES-256 in counter mode makes of a key, or take it away; in place.

    Args:
        vector: contiguous.
        key: 32 bytes, used for one mask.
        sign: 1 or -1.
    """
    stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
    made = np.empty(_PART + 4, np.uint32)  # update_into wants room for a block more
    raw = made.view(np.uint8).data
    for start in range(0, len(vector), _PART):
        part = vector[start : start + _PART]
        stream.update_into(memoryview(_ZEROS)[: 4 * len(part)], raw)
        mask = made[: len(part)]
        if sign > 0:
            np.add(part, mask, out=part)
        else:
            np.subtract(part, mask, out=part)
