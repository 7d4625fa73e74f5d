"""Secure aggregation in training: the mean of the sites' changes, and no single one of them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wsfed.errors import SecAggAborted, WsfedError
from wsfed.federated.contribution import Contributor, SecAgg
from wsfed.privacy import masks
from wsfed.privacy.secagg import (
    EXTRA,
    Collector,
    Numbers,
    least_threshold,
    pack,
    unpack_members,
    unpack_table,
)

__all__ = ["SecureMean", "SecureRounds"]


@dataclass(frozen=True, slots=True)
class SecureMean:
    """What came of a round.

    Attributes:
        mean: of the members' values, weighted by rows; one dimension of float64.
        rows: of all members together.
        members: whose values are in it.
        lost: why the others' are not, by name.
    """

    mean: torch.Tensor
    rows: int
    members: Sequence[str]
    lost: Mapping[str, str]


class SecureRounds:
    """Who adds up, over the rounds of one training.

    Args:
        secagg: settings.
    """

    def __init__(self, secagg: SecAgg) -> None:
        self._secagg = secagg
        self._session = secrets.token_bytes(16)

    async def mean(
        self, number: int, contributors: Sequence[Contributor], length: int, model: bytes
    ) -> SecureMean:
        """The mean of what the contributors have.

        Args:
            number: of the round, from 1.
            contributors: who takes part.
            length: of the values.
            model: SHA-256 of the model that all of them were given.

        Raises:
            SecAggAborted: too few stayed to the end, or they do not agree.
        """
        left, lost = list(contributors), dict[str, str]()
        for attempt in range(self._secagg.attempts):
            try:
                one = _Attempt(self._secagg, left, lost)
                return await one.run(self._session, number, attempt, length, model)
            except SecAggAborted as aborted:
                left = [each for each in left if each.name not in lost]
                too_few = len(left) < self._secagg.roster.min_members
                if too_few or attempt + 1 == self._secagg.attempts:
                    why = "; ".join(f"{name}: {reason}" for name, reason in lost.items())
                    reason = f"{aborted.reason} ({why})" if why else aborted.reason
                    raise SecAggAborted(number, reason, aborted.missing) from None
        raise AssertionError("there is at least one attempt")


class _Attempt:
    """One attempt at a round."""

    def __init__(
        self, secagg: SecAgg, contributors: Sequence[Contributor], lost: dict[str, str]
    ) -> None:
        self._roster, self._patience = secagg.roster, secagg.patience
        self._contributors, self._lost = contributors, lost
        self._adding = asyncio.Lock()

    async def run(
        self, session: bytes, number: int, attempt: int, length: int, model: bytes
    ) -> SecureMean:
        """All six steps."""
        roster = self._roster
        most = min(max(each.rows for each in self._contributors), roster.max_weight)
        threshold = max(least_threshold(len(self._contributors)), roster.max_colluders + 2)
        threshold = max(threshold, least_threshold(roster.min_members))
        numbers = Numbers(session, number, attempt, threshold, length + EXTRA, roster.bound, most)
        collector = Collector(roster, numbers, model)
        people = {collector.number_of(each.name): each for each in self._contributors}
        packed = numbers.packed
        await self._step(0, people, lambda _: packed, lambda u, t: collector.add_keys(u, _raw(t)))
        keys = pack(collector.all_keys())
        there = self._left(people)
        await self._step(1, there, lambda _: keys, lambda u, t: collector.add_shares(u, _table(t)))
        sealed = collector.shares_for()
        there = {u: people[u] for u in sealed}
        await self._step(
            2, there, lambda u: pack(sealed[u]), lambda u, t: collector.add_opened(u, _members(t))
        )
        masking, dropped = collector.members_that_mask()
        self._lost |= dropped
        there, goes_on = {u: people[u] for u in masking}, pack(masking)
        await self._step(
            3, there, lambda _: goes_on, lambda u, t: collector.add_masked(u, _vector(t))
        )
        inside = collector.members_of_sum()
        there = {u: people[u] for u in inside}
        told = pack(inside)
        await self._step(4, there, lambda _: told, lambda u, t: collector.add_signature(u, _raw(t)))
        signatures = collector.all_signatures()
        there, signed = {u: people[u] for u in signatures}, pack(signatures)
        await self._step(
            5, there, lambda _: signed, lambda u, t: collector.add_unmasking(u, _table(t))
        )
        total, names = await asyncio.to_thread(collector.total)
        return self._mean(numbers, total, names)

    def _left(self, people: Mapping[int, Contributor]) -> dict[int, Contributor]:
        return {u: each for u, each in people.items() if each.name not in self._lost}

    async def _step(
        self,
        step: int,
        people: Mapping[int, Contributor],
        say: Callable[[int], bytes],
        take: Callable[[int, torch.Tensor], None],
    ) -> None:
        """Ask all of them at once; who fails, or takes too long, is lost."""

        async def ask(member: int, contributor: Contributor) -> None:
            try:
                async with asyncio.timeout(self._patience):
                    told = await contributor.ask(step, say(member))
                async with self._adding:
                    await asyncio.to_thread(take, member, told)
            except TimeoutError:
                self._lost[contributor.name] = f"no answer in {self._patience} s (step {step})"
            except WsfedError as error:
                self._lost[contributor.name] = str(error)

        async with asyncio.TaskGroup() as group:
            for member, contributor in people.items():
                group.create_task(ask(member, contributor))

    def _mean(self, numbers: Numbers, total: masks.Vector, names: Sequence[str]) -> SecureMean:
        if int(total[-1]) != len(names):
            raise SecAggAborted(
                numbers.round, "masks have not cancelled: members had different keys or models"
            )
        rows, members = int(total[-EXTRA]), len(self._roster.members)
        values = masks.dequantise(total[:-EXTRA], members, self._roster.reach)
        values *= numbers.max_weight / rows
        lost = {name: why for name, why in self._lost.items() if name not in names}
        return SecureMean(torch.from_numpy(values), rows, names, lost)


# --- what members answer --------------------------------------------------------------------------


def _raw(told: torch.Tensor) -> bytes:
    return bytes(told.numpy()) if told.dtype is torch.uint8 else b""


def _table(told: torch.Tensor) -> dict[int, bytes]:
    try:
        return unpack_table(_raw(told))
    except ValueError as error:
        raise SecAggAborted(0, str(error)) from None


def _members(told: torch.Tensor) -> list[int]:
    try:
        return unpack_members(_raw(told))
    except ValueError as error:
        raise SecAggAborted(0, str(error)) from None


def _vector(told: torch.Tensor) -> masks.Vector:
    if told.dtype is not torch.int32:
        raise SecAggAborted(0, "a member's answer is malformed")
    return told.numpy().view(np.uint32)
