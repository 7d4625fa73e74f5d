"""A session's part in secure aggregation: what leaves of its tensors is masked, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgpack
import numpy as np
import torch

from wsfed.errors import RemoteError
from wsfed.privacy import masks
from wsfed.privacy.roster import Membership
from wsfed.privacy.secagg import Member, Numbers
from wsfed.tensors import describe, hash_of

__all__ = ["SecureRounds"]

#: Elements behind the values: rows, and a one that tells whether all masks have cancelled.
EXTRA: Final = 2


class SecureRounds:
    """The rounds of one session.

    Args:
        membership: the worker's, set by its owner.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._member: Member | None = None

    def step(
        self,
        step: int,
        told: bytes,
        rows: int,
        values: Sequence[torch.Tensor],
        given: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """One step; see :class:`~wsfed.protocol.messages.SecAgg`.

        Args:
            step: 0 to 4.
            told: by the collector.
            rows: of the data set.
            values: to contribute.
            given: the model.

        Raises:
            SecAggAborted: this member takes no further part in the round.
            RemoteError: what is asked for is malformed, or not what the roster allows.
        """
        if step == 0:
            return _bytes(self._begin(told, given))
        if (member := self._member) is None:
            raise RemoteError("no round of secure aggregation has begun here")
        if step == 1:
            return _bytes(_pack(member.share(_table(told))))
        if step == 2:
            vector = self._vector(member, rows, values, given)
            sealed = _table(told)
            session = member.numbers.session
            masked = member.mask(
                sealed, vector, lambda r, a: self._membership.journal.write(session, r, a)
            )
            return torch.from_numpy(masked.view(np.int32))
        if step == 3:
            return _bytes(member.confirm(_members(told)))
        self._member = None
        return _bytes(_pack(member.unmask(_table(told))))

    def _begin(self, told: bytes, given: Sequence[torch.Tensor]) -> bytes:
        mine = self._membership
        try:
            numbers = Numbers.unpack(told)
        except ValueError as error:
            raise RemoteError(str(error)) from None
        last = mine.journal.last(numbers.session)
        self._member = None
        self._member = Member(mine.name, mine.key, mine.roster, numbers, hash_of(given), last)
        return self._member.keys()

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


def _pack(table: dict[int, bytes]) -> bytes:
    packed: bytes = msgpack.packb([[member, told] for member, told in table.items()])
    return packed


def _unpack(told: bytes) -> Any:
    try:
        return msgpack.unpackb(told, max_bin_len=256, max_array_len=128)
    except Exception as error:
        raise RemoteError(f"malformed step of secure aggregation: {error}") from None


def _table(told: bytes) -> dict[int, bytes]:
    rows = _unpack(told)
    is_table = isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 2 and type(row[0]) is int and type(row[1]) is bytes
        for row in rows
    )
    if not is_table or len({row[0] for row in rows}) != len(rows):
        raise RemoteError("malformed step of secure aggregation: no table of members")
    return dict(rows)


def _members(told: bytes) -> list[int]:
    members = _unpack(told)
    if not isinstance(members, list) or not all(type(each) is int for each in members):
        raise RemoteError("malformed step of secure aggregation: no list of members")
    return members
