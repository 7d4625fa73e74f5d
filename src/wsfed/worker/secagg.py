"""A session's part in secure aggregation: what leaves of its tensors is masked, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from wsfed.errors import RemoteError, SecAggAborted
from wsfed.privacy import masks
from wsfed.privacy.cohorts import Unmasked, check_cohort
from wsfed.privacy.roster import Membership
from wsfed.privacy.secagg import EXTRA, Member, Numbers, pack, unpack_members, unpack_table
from wsfed.privacy.structure import check_rows, check_structure
from wsfed.tensors import describe, hash_of

__all__ = ["SecureRounds"]


class SecureRounds:
    """The rounds of one session.

    Args:
        membership: the worker's, set by its owner.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._member: Member | None = None
        self._model, self._dataset = b"", ""

    def step(
        self,
        step: int,
        told: bytes,
        dataset: str,
        rows: int,
        values: Sequence[torch.Tensor],
        given: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """One step; see :class:`~wsfed.protocol.messages.SecAgg`.

        Args:
            step: 0 to 5.
            told: by the collector.
            dataset: whose rows count as the weight.
            rows: of it.
            values: to contribute.
            given: the model.

        Raises:
            SecAggAborted: this member takes no further part in the round.
            RemoteError: what is asked for is malformed, or not what the roster allows.
        """
        try:
            if step == 0:
                return _bytes(self._begin(told, given))
            if (member := self._member) is None:
                raise RemoteError("no round of secure aggregation has begun here")
            if step == 1:
                return _bytes(pack(member.share(unpack_table(told))))
            if step == 2:
                return _bytes(pack(member.open(unpack_table(told))))
            if step == 3:
                members, self._dataset = unpack_members(told), dataset
                vector = self._vector(member, rows, values, given)
                masked = member.mask(members, vector, self._remember)
                return torch.from_numpy(masked.view(np.int32))
            if step == 4:
                return _bytes(member.confirm(unpack_members(told)))
            try:
                return _bytes(pack(member.unmask(unpack_table(told))))
            finally:
                self._member = None
        except ValueError as error:  # malformed; what a roster refuses is SecAggAborted
            raise RemoteError(str(error)) from None

    def _begin(self, told: bytes, given: Sequence[torch.Tensor]) -> bytes:
        mine = self._membership
        numbers = Numbers.unpack(told)
        last = mine.journal.last(numbers.session)
        self._member = None
        self._model = hash_of(given)
        member = Member(
            *(mine.name, mine.key, mine.roster, numbers, self._model, last),
            approve=self._approve,
        )
        try:
            mine.journal.check_rate(*self._rate)
            check_structure(mine.roster.arch_hash, given)
            check_rows(given, mine.most_alike)
        except ValueError as error:
            raise SecAggAborted(numbers.round, f"{mine.name}: {error}") from None
        self._member = member
        return member.keys()

    @property
    def _rate(self) -> tuple[int, int]:
        return self._membership.roster.round_rate, self._membership.roster.rate_seconds

    def _remember(self, round: int, attempt: int) -> None:
        """On the disk before anything leaves; the first time, with a masked vector, it counts."""
        assert self._member is not None
        journal, session = self._membership.journal, self._member.numbers.session
        begins = attempt == self._member.numbers.attempt
        journal.write(session, round, attempt, self._rate if begins else None)

    def _approve(self, members: Sequence[str], leaving: bool) -> None:
        """Whether shares may be given for the sum over these; noted when they leave."""
        mine = self._membership
        roster = mine.roster
        new = Unmasked(roster.id, roster.epoch, self._dataset, self._model, frozenset(members))

        def check(earlier: Sequence[Unmasked]) -> None:
            check_cohort(mine.cohorts, roster.max_colluders, earlier, new)

        if leaving:
            mine.journal.unmask(new, check)
        else:
            mine.journal.check(check)

    def _vector(
        self,
        member: Member,
        rows: int,
        values: Sequence[torch.Tensor],
        given: Sequence[torch.Tensor],
    ) -> masks.Vector:
        """Values as integers, clipped and weighted; rows and a one behind them."""
        roster, numbers = self._membership.roster, member.numbers
        if rows < roster.min_rows:
            raise RemoteError(f"{rows} rows are fewer than the roster's {roster.min_rows}")
        change = _flat(values, given)
        if len(change) + EXTRA != numbers.length:
            raise RemoteError(f"{len(change)} values, where {numbers.length - EXTRA} are agreed")
        norm = float(torch.linalg.vector_norm(change))
        if not norm < float("inf"):
            raise RemoteError("the values to contribute are not finite")
        weight = min(rows, numbers.max_weight)
        change.mul_(min(1.0, roster.bound / max(norm, 1e-30)) * weight / numbers.max_weight)
        if roster.noise:
            masks.add_noise(change.numpy(), roster.deviation, roster.reach)
        vector = np.empty(numbers.length, np.uint32)
        members = len(roster.members)
        vector[:-EXTRA] = masks.quantise(change.numpy(), members, roster.reach)
        vector[-EXTRA:] = weight, 1
        return vector


def _flat(values: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor:
    """The change from ``given`` to ``values``, one dimension of float64."""
    if given and [v.shape for v in values] != [g.shape for g in given]:
        told = ", ".join(str(describe(value)) for value in values[:5])
        raise RemoteError(f"values and model have different shapes: {told}")
    for value in values:
        if not value.is_floating_point():
            raise RemoteError(f"{value.dtype} cannot be added up securely; give fractional numbers")
    whole = torch.empty(sum(value.numel() for value in values), dtype=torch.float64)
    place = 0
    for number, value in enumerate(values):
        part = whole[place : place + value.numel()]
        part.copy_(value.detach().reshape(-1))
        if given:
            part -= given[number].detach().reshape(-1).cpu()
        place += value.numel()
    return whole


def _bytes(told: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(told), dtype=torch.uint8)
