"""Differential privacy of whole sites: what is released hardly depends on any single one.

Each site's change is clipped on its worker, the client adds them up, and noise is added to the sum
before anything else is done with it (DP-FedAvg: McMahan et al. 2018, *Learning differentially
private recurrent language models*). Sites count alike, whatever their rows. So it protects against
who gets the model, and not against the client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from wsfed.privacy.mechanism import Mechanism
from wsfed.privacy.noise import unforeseeable

__all__ = ["CLIP", "DP", "Noise", "follow", "release"]

#: Where the clipping bound stands in a strategy's memory, so that it is part of checkpoints.
CLIP: Final = "privacy/clip"


@dataclass(frozen=True, slots=True)
class DP(Mechanism):
    """Clip each site's change, add noise to the sum, and account for it.

    Attributes:
        clip: L2 norm to which a change is clipped; the first one, where it adapts.
        noise: standard deviation of the noise on the sum, in units of ``clip``.
        delta: of the guarantee; below one over the number of sites.
        budget: epsilon at which training ends; ``None`` for no end.
        quantile: have ``clip`` follow this quantile of the norms (Andrew et al. 2021,
            *Differentially private learning with adaptive clipping*); ``None`` to keep it.
        rate: how fast it follows.
        count_noise: standard deviation of the noise on how many sites are within ``clip``.
    """

    quantile: float | None = None
    rate: float = 0.2
    count_noise: float = 5.0

    def __post_init__(self) -> None:
        Mechanism.__post_init__(self)  # a dataclass with slots has no super()
        if self.quantile is not None and not (
            0 < self.quantile < 1 and self.rate > 0 and 2 * self.count_noise > self.noise
        ):
            raise ValueError(
                "quantile is between 0 and 1, rate positive, and count_noise above half of noise: "
                f"quantile={self.quantile}, rate={self.rate}, count_noise={self.count_noise}"
            )

    @property
    def noise_on_values(self) -> float:
        """In units of ``clip``; more where part of the guarantee goes to the count.

        ``(noise ** -2 - (2 * count_noise) ** -2) ** -0.5`` (Andrew et al. 2021, theorem 1).
        """
        if self.quantile is None:
            return self.noise
        return float((self.noise**-2 - (2 * self.count_noise) ** -2) ** -0.5)


class Noise:
    """Gaussian noise that nobody can foresee."""

    def __init__(self) -> None:
        self._generator = unforeseeable()

    def add(self, values: torch.Tensor, deviation: float) -> torch.Tensor:
        """Values with Gaussian noise, of the same dtype."""
        drawn = self._generator.normal(0.0, deviation, tuple(values.shape))
        return (values.double() + torch.from_numpy(np.asarray(drawn))).to(values.dtype)

    def number(self, deviation: float) -> float:
        """One number."""
        return float(self._generator.normal(0.0, deviation))


def release(
    dp: DP,
    noise: Noise,
    clip: float,
    given: Mapping[str, torch.Tensor],
    sums: Mapping[str, torch.Tensor],
    count: float,
) -> dict[str, torch.Tensor]:
    """The mean of clipped changes with noise, added to the model that they began with.

    Args:
        dp: settings.
        noise: to draw from.
        clip: bound of each change.
        given: the model; what is no fractional number stays as it is.
        sums: of the sites' values minus the model's.
        count: expected number of sites.
    """
    deviation = dp.noise_on_values * clip
    made = {}
    for name, value in given.items():
        if value.is_floating_point():
            noisy = noise.add(sums[name], deviation) / count
            made[name] = (value.double() + noisy).to(value.dtype)
        else:
            made[name] = value
    return made


def follow(dp: DP, noise: Noise, clip: float, within: Sequence[bool], count: float) -> float:
    """The next bound: ``clip * exp(-rate * (share within, with noise, - quantile))``."""
    if dp.quantile is None:
        return clip
    # Each site counts by +-1/2, so that its part in the sum is at most that.
    share = (sum(each - 0.5 for each in within) + noise.number(dp.count_noise)) / count + 0.5
    return clip * math.exp(-dp.rate * (share - dp.quantile))
