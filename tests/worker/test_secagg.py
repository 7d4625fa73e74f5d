"""What a worker gives of its tensors in a round of secure aggregation, and what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsfed.errors import RemoteError, SecAggAborted
from wsfed.privacy.cohorts import CohortPolicy
from wsfed.privacy.journal import Journal
from wsfed.privacy.masks import dequantise
from wsfed.privacy.roster import Membership, Roster, new_key, public_key
from wsfed.privacy.secagg import (
    EXTRA,
    Collector,
    Numbers,
    least_threshold,
    pack,
    unpack_members,
    unpack_table,
)
from wsfed.tensors import hash_of
from wsfed.worker.secagg import SecureRounds

KEYS = {f"w{number}": new_key() for number in range(1, 5)}
PUBLIC = {name: public_key(key) for name, key in KEYS.items()}
GIVEN = [torch.zeros(3, 2), torch.zeros(2)]
LENGTH = 8 + EXTRA


def roster_of(**changes: Any) -> Roster:
    return Roster("clinics", 1, PUBLIC, **{"bound": 2.0, **changes})


def rounds_of(roster: Roster, **more: Any) -> dict[int, SecureRounds]:
    return {
        u: SecureRounds(Membership(name, KEYS[name], roster, **more))
        for u, name in enumerate(roster.order, 1)
    }


class Play:
    """A round of workers, step by step."""

    def __init__(
        self, roster: Roster, rounds: dict[int, SecureRounds], session: bytes = b"s" * 16
    ) -> None:
        self.rounds, self.roster = rounds, roster
        threshold = least_threshold(len(rounds))
        self.numbers = Numbers(session, 1, 0, threshold, LENGTH, roster.bound, 64)
        self.collector = Collector(roster, self.numbers, hash_of(GIVEN))

    def ask(self, u: int, step: int, told: bytes, values: Sequence[torch.Tensor] = ()) -> Any:
        given = GIVEN if step in (0, 3) else []
        return self.rounds[u].step(step, told, "points", 64, values, given).numpy()

    def raw(self, u: int, step: int, told: bytes) -> bytes:
        return bytes(self.ask(u, step, told))

    def open(self) -> bytes:
        """Up to who masks."""
        for u in self.rounds:
            self.collector.add_keys(u, self.raw(u, 0, self.numbers.packed))
        keys = pack(self.collector.all_keys())
        for u in self.rounds:
            self.collector.add_shares(u, unpack_table(self.raw(u, 1, keys)))
        for u, sealed in self.collector.shares_for().items():
            self.collector.add_opened(u, unpack_members(self.raw(u, 2, pack(sealed))))
        return pack(self.collector.members_that_mask()[0])

    def mask(self, u: int, u2: bytes, values: Sequence[torch.Tensor]) -> None:
        self.collector.add_masked(u, self.ask(u, 3, u2, values).view(np.uint32))

    def sign(self) -> bytes:
        u3 = self.collector.members_of_sum()
        for u in u3:
            self.collector.add_signature(u, self.raw(u, 4, pack(u3)))
        return pack(self.collector.all_signatures())

    def unmask(self, signatures: bytes) -> np.ndarray[Any, Any]:
        for u in unpack_table(signatures):
            shares = unpack_table(self.raw(u, 5, signatures))
            self.collector.add_unmasking(u, shares)
        return self.collector.total()[0]


def values_of(*numbers: float) -> list[torch.Tensor]:
    whole = torch.tensor(numbers)
    return [whole[:6].reshape(3, 2), whole[6:]]


@pytest.mark.parametrize("sign", [1, -1])
def test_all_workers_at_the_bound_do_not_overflow(sign: int) -> None:
    roster = roster_of()
    one = Play(roster, rounds_of(roster))
    u2 = one.open()
    for u in one.rounds:
        one.mask(u, u2, values_of(sign * 2.0, *[0.0] * 7))
    total = one.unmask(one.sign())
    assert total[-EXTRA:].tolist() == [4 * 64, 4]
    found = dequantise(total[:-EXTRA], 4, roster.reach)
    assert found == pytest.approx([sign * 8.0, *[0.0] * 7], abs=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_sent_and_the_others_go_on(value: float) -> None:
    roster = roster_of()
    journals = {u: Journal() for u in range(1, 5)}
    rounds = {
        u: SecureRounds(Membership(name, KEYS[name], roster, journals[u]))
        for u, name in enumerate(roster.order, 1)
    }
    one = Play(roster, rounds)
    u2 = one.open()
    with pytest.raises(RemoteError, match="not finite"):
        one.mask(2, u2, values_of(value, *[0.0] * 7))
    assert journals[2].last(one.numbers.session) == (0, -1)
    for u in (1, 3, 4):
        one.mask(u, u2, values_of(*[0.25] * 8))
    total = one.unmask(one.sign())
    assert dequantise(total[:-EXTRA], 4, roster.reach) == pytest.approx([0.75] * 8, abs=1e-7)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([torch.zeros(3, 2)], "different shapes"),
        ([torch.zeros(2, 3), torch.zeros(2)], "different shapes"),
        ([torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2)], "cannot be added up securely"),
    ],
)
def test_values_of_another_kind_are_not_sent(values: list[torch.Tensor], says: str) -> None:
    roster = roster_of()
    one = Play(roster, rounds_of(roster))
    u2 = one.open()
    with pytest.raises(RemoteError, match=says):
        one.mask(1, u2, values)


@pytest.mark.parametrize("after", ["mask", "sign", "unmask"])
def test_a_worker_that_was_restarted_answers_no_further_step_of_the_round(
    tmp_path: Path, after: str
) -> None:
    roster = roster_of()
    rounds = rounds_of(roster)

    def start() -> None:
        mine = Membership("w1", KEYS["w1"], roster, Journal(tmp_path / "w1"))
        rounds[1] = SecureRounds(mine)

    start()
    one = Play(roster, rounds)
    u2, zeros = one.open(), values_of(*[0.0] * 8)
    for u in one.rounds:
        one.mask(u, u2, zeros)
    signatures = one.sign() if after != "mask" else b"\x90"
    if after == "unmask":
        one.unmask(signatures)
    start()
    for step, told in ((3, u2), (4, u2), (5, signatures)):
        with pytest.raises(RemoteError, match="no round of secure aggregation has begun"):
            one.ask(1, step, told, zeros)
    with pytest.raises(SecAggAborted, match="took part in this round, or a later one, already"):
        one.ask(1, 0, one.numbers.packed)


def test_shares_are_given_once_and_forgotten() -> None:
    roster = roster_of()
    one = Play(roster, rounds_of(roster))
    u2 = one.open()
    for u in one.rounds:
        one.mask(u, u2, values_of(*[0.0] * 8))
    signatures = one.sign()
    one.unmask(signatures)
    for u in one.rounds:
        with pytest.raises(RemoteError, match="no round"):
            one.ask(u, 5, signatures)
        assert one.rounds[u]._member is None


def test_shares_for_a_sum_that_may_not_be_had_do_not_leave() -> None:
    """Of two rounds at once, signed before either was unmasked, over groups that differ by one."""
    roster = roster_of(max_colluders=0)
    memberships = [Membership(n, KEYS[n], roster, Journal(), CohortPolicy()) for n in roster.order]
    plays = []
    for session, left_out in ((b"a" * 16, 0), (b"b" * 16, 4)):
        one = Play(roster, {u: SecureRounds(m) for u, m in enumerate(memberships, 1)}, session)
        u2 = one.open()
        for u in one.rounds:
            if u != left_out:
                one.mask(u, u2, values_of(*[0.0] * 8))
        plays.append((one, one.sign()))
    (first, signatures), (second, later) = plays
    first.unmask(signatures)
    for u in (1, 2, 3):
        with pytest.raises(SecAggAborted, match=r"same model differ by 1 members \('w4'\)"):
            second.ask(u, 5, later)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arch_hash": "00" * 32}, "another structure than the roster's"),
        ({"round_rate": 1}, "1 rounds in 86400 s already"),
    ],
)
def test_what_the_roster_forbids_is_refused_before_keys_are_made(
    change: dict[str, Any], says: str
) -> None:
    roster = roster_of(**change)
    journal = Journal()
    journal.write(b"x" * 16, 1, 0, (9, 60))
    mine = SecureRounds(Membership("w1", KEYS["w1"], roster, journal))
    one = Play(roster, {1: mine, 2: mine, 3: mine, 4: mine})
    with pytest.raises(SecAggAborted, match=says):
        one.ask(1, 0, one.numbers.packed)
    with pytest.raises(RemoteError, match="no round"):
        one.ask(1, 1, b"\x90")
