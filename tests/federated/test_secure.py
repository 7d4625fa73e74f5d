"""Under secure aggregation training is the same, and no single reply is seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import points
from wsfed import federated
from wsfed.errors import GetNotPermitted, RemoteError
from wsfed.federated.contribution import Contributor
from wsfed.privacy.cohorts import CohortPolicy
from wsfed.privacy.journal import Journal
from wsfed.privacy.roster import Membership, Roster, new_key, public_key
from wsfed.privacy.secagg import pack, unpack_table
from wsfed.protocol import messages as m
from wsfed.worker.strict import Ledger, Releases

SGD = partial(torch.optim.SGD, lr=0.1)
NAMES = ("alice", "bob", "carol", "dave", "erin")
KEYS = {name: new_key() for name in NAMES}
PUBLIC = {name: public_key(key) for name, key in KEYS.items()}
ROSTER = Roster("clinics", 1, PUBLIC, bound=5.0)


def member(
    name: str,
    rows: int = 48,
    roster: Roster = ROSTER,
    journal: Journal | None = None,
    **more: Any,
) -> wsfed.VirtualWorker:
    data = wsfed.Dataset("points", points(rows, NAMES.index(name)))
    membership = Membership(name, KEYS[name], roster, journal or Journal(), **more)
    return wsfed.VirtualWorker(name, datasets=[data], membership=membership)


@pytest.fixture
async def members() -> AsyncIterator[list[wsfed.Worker]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(member(name, 40 + 8 * number))
            for number, name in enumerate(NAMES)
        ]


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


async def fit(model: nn.Module, workers: Sequence[wsfed.Worker], **more: Any) -> federated.History:
    arguments = {"rounds": 3, "batch_size": 8, **more}
    return await federated.fit(model, workers, "points", F.cross_entropy, SGD, **arguments)


@pytest.mark.parametrize(
    "strategy",
    [federated.FedAvg(), federated.FedSGD(0.5), federated.FedProx(0.1), federated.FedAvgM()],
    ids=lambda strategy: strategy.name,
)
async def test_training_is_the_same(
    members: list[wsfed.Worker], strategy: federated.Strategy
) -> None:
    plain, secure = network(), network()
    await fit(plain, members, strategy=strategy)
    history = await fit(secure, members, strategy=strategy, privacy=federated.SecAgg(ROSTER))
    for one, other in zip(plain.parameters(), secure.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-6)
    if not strategy.wants_gradients:
        assert torch.allclose(plain[1].running_mean, secure[1].running_mean, rtol=0, atol=1e-6)
    assert all(site.outcome == "used" for each in history for site in each.sites)


async def test_strict_members_add_up_and_release_nothing_else() -> None:
    plain, secure = network(), network()
    async with AsyncExitStack() as stack:
        workers, free = [], []
        for name in NAMES:
            data = [wsfed.Dataset("points", points(40, NAMES.index(name)))]
            membership = Membership(name, KEYS[name], ROSTER, Journal())
            strict = wsfed.VirtualWorker(
                name, datasets=data, membership=membership, ledger=Ledger(Releases())
            )
            workers.append(await stack.enter_async_context(strict))
            free.append(await stack.enter_async_context(wsfed.VirtualWorker(name, datasets=data)))
        await fit(plain, free)
        await fit(secure, workers, privacy=federated.SecAgg(ROSTER))
        with pytest.raises(GetNotPermitted):
            await (await workers[0].dataset("points")).batch(40, 0)[0].sum()
    for one, other in zip(plain.parameters(), secure.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-6)


async def test_a_large_change_is_clipped_to_the_bound(members: list[wsfed.Worker]) -> None:
    small = Roster("clinics", 2, PUBLIC, bound=0.01)
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(member(name, 40, small)) for name in NAMES]
        model, before = network(), network()
        await fit(model, workers, rounds=1, privacy=federated.SecAgg(small))
    pairs = zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    changes = [(one - other).double().norm() for one, other in pairs if one.is_floating_point()]
    assert 0.001 < float(torch.stack(changes).norm()) <= 0.01 + 1e-6


async def test_members_add_the_noise_of_the_roster() -> None:
    noisy = Roster("clinics", 4, PUBLIC, min_members=5, bound=0.5, noise=2.0)
    torch.manual_seed(0)
    model = nn.Linear(4, 4000, bias=False)
    before = model.weight.detach().clone()
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(member(name, 40, noisy)) for name in NAMES]
        await federated.fit(
            *(model, workers, "points", F.cross_entropy, partial(torch.optim.SGD, lr=0.0)),
            rounds=1,
            privacy=federated.SecAgg(noisy),
        )
    # That of four members, one colluder not counted, is noise * bound; the mean is over five.
    expected = 2.0 * 0.5 * (5 / 4) ** 0.5 / 5
    assert float((model.weight.detach() - before).std()) == pytest.approx(expected, rel=0.05)


async def test_a_member_that_is_lost_is_left_out(
    members: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the six steps one member is lost."""
    for step in range(6):
        _lose(monkeypatch, {"bob": step})
        history = await fit(network(step), members, rounds=1, privacy=federated.SecAgg(ROSTER))
        outcomes = {site.site: site.outcome for site in history[0].sites}
        used = {name for name, outcome in outcomes.items() if outcome == "used"}
        assert used == set(NAMES) - ({"bob"} if step < 4 else set()), step
        assert (step >= 4) or "power cut" in outcomes["bob"]


async def test_a_member_that_seals_rubbish_is_dropped_and_named(
    members: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One other cannot open what it has sealed; the others go on without it."""
    from wsfed.federated.site import Site

    contributor = _CONTRIBUTOR
    bob = ROSTER.order.index("bob") + 1

    def meddling(site: Site, strategy: Any) -> Contributor:
        whole = contributor(site, strategy)

        async def ask(step: int, told: bytes) -> torch.Tensor:
            if step == 2 and whole.name == "alice":
                told = pack({**unpack_table(told), bob: bytes(82)})
            return await whole.ask(step, told)

        return Contributor(whole.name, whole.rows, ask)

    monkeypatch.setattr(Site, "contributor", meddling)
    history = await fit(network(), members, rounds=1, privacy=federated.SecAgg(ROSTER))
    outcomes = {site.site: site.outcome for site in history[0].sites}
    assert "shares between it and alice cannot be opened" in outcomes.pop("bob")
    assert set(outcomes.values()) == {"used"}


async def test_too_few_members_come_to_no_sum(
    members: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    _lose(monkeypatch, {"bob": 3, "dave": 3})
    model, before = network(), network()
    with pytest.raises(wsfed.SecAggAborted, match=r"3 members have sent.*power cut") as caught:
        await fit(model, members, privacy=federated.SecAgg(ROSTER, attempts=1))
    assert set(caught.value.missing) == {"bob", "dave"}
    assert len(caught.value.history) == 0
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


async def test_another_attempt_is_made_with_those_that_are_left(
    members: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    _lose(monkeypatch, {"bob": 3, "dave": 3})
    history = await fit(network(), members, rounds=1, privacy=federated.SecAgg(ROSTER))
    outcomes = {site.site: site.outcome for site in history[0].sites}
    assert {n for n, outcome in outcomes.items() if outcome == "used"} == {"alice", "carol", "erin"}


def _lose(monkeypatch: pytest.MonkeyPatch, at: dict[str, int]) -> None:
    """These members do not answer from these steps on."""
    from wsfed.federated.site import Site

    contributor = _CONTRIBUTOR

    def unreliable(site: Site, strategy: Any) -> Contributor:
        whole = contributor(site, strategy)

        async def ask(step: int, told: bytes) -> torch.Tensor:
            if step >= at.get(whole.name, 9):
                raise RemoteError("power cut")
            return await whole.ask(step, told)

        return Contributor(whole.name, whole.rows, ask)

    monkeypatch.setattr(Site, "contributor", unreliable)


def _original() -> Any:
    from wsfed.federated.site import Site

    return Site.contributor


_CONTRIBUTOR = _original()


async def test_what_the_collector_gets_tells_nothing_of_one_member(
    members: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every masked vector looks like noise, and the values never come any other way."""
    from wsfed.federated.site import Site

    seen: list[tuple[int, torch.Tensor]] = []
    fetched: list[Any] = []

    def watched(site: Site, strategy: Any) -> Contributor:
        whole = _CONTRIBUTOR(site, strategy)

        async def ask(step: int, told: bytes) -> torch.Tensor:
            made = await whole.ask(step, told)
            seen.append((step, made))
            return made

        return Contributor(whole.name, whole.rows, ask)

    monkeypatch.setattr(Site, "contributor", watched)
    monkeypatch.setattr("wsfed.federated.replica.modules.get", fetched.append)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(4, 2000), nn.ReLU(), nn.Linear(2000, 2))
    await fit(wide, members, rounds=1, privacy=federated.SecAgg(ROSTER))
    vectors = [made.numpy().view(np.uint8) for step, made in seen if step == 3]
    assert len(vectors) == 5
    assert not fetched
    for vector in vectors:
        counts = np.bincount(vector, minlength=256)
        square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert square < 255 + 7 * (2 * 255) ** 0.5  # chi-square of 255 degrees, 7 deviations
    assert all(len(made) < 1000 for step, made in seen if step != 3)


# --- what a worker refuses ------------------------------------------------------------------------


async def _ask(
    worker: wsfed.Worker,
    step: int,
    told: bytes = b"",
    values: Sequence[Any] = (),
    given: Sequence[Any] = (),
    name: str = "points",
) -> torch.Tensor:
    ids = [[each._handle.id for each in group] for group in (values, given)]
    said = torch.frombuffer(bytearray(told or b"\0"), dtype=torch.uint8)
    made: torch.Tensor = await worker.link.ask(
        lambda number: m.SecAgg(number, step, name, *ids, 0).wire(), tensor=said
    )
    return made


async def test_a_worker_without_a_roster_takes_no_part() -> None:
    async with wsfed.VirtualWorker("alice") as alice:
        with pytest.raises(RemoteError, match="no member of a roster"):
            await _ask(alice, 0)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
async def test_no_step_is_taken_before_a_round_begins(step: int) -> None:
    async with member("alice") as alice:
        with pytest.raises(RemoteError, match="no round"):
            await _ask(alice, step)


async def test_malformed_steps_are_refused() -> None:
    async with member("alice") as alice:
        for told in (b"", b"\xc1", b"\x93", b"\x90", bytes(500)):
            with pytest.raises(RemoteError, match="no numbers of a round"):
                await _ask(alice, 0, told)


async def test_few_rows_are_not_contributed() -> None:
    roster = Roster("clinics", 3, PUBLIC, min_rows=41, bound=5.0)
    async with AsyncExitStack() as stack:
        rows = {"alice": 40, "bob": 50, "carol": 60, "dave": 70, "erin": 80}
        workers = [
            await stack.enter_async_context(member(name, count, roster))
            for name, count in rows.items()
        ]
        history = await fit(network(), workers, rounds=1, privacy=federated.SecAgg(roster))
    outcomes = {site.site: site.outcome for site in history[0].sites}
    assert "40 rows are fewer than the roster's 41" in outcomes["alice"]
    assert [outcome for name, outcome in outcomes.items() if name != "alice"] == ["used"] * 4


async def test_members_that_were_given_different_models_come_to_no_sum(
    members: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector that gives one member another model, to tell its change from the others'."""
    from wsfed.federated.replica import Replica

    give = Replica.give

    def another(replica: Replica, state: Any, terms: Any) -> None:
        if replica.worker.id == "bob":
            state = {name: value + 1 for name, value in state.items()}
        give(replica, state, terms)

    monkeypatch.setattr(Replica, "give", another)
    with pytest.raises(wsfed.SecAggAborted, match="not signed by it for this round"):
        await fit(network(), members, rounds=1, privacy=federated.SecAgg(ROSTER))


async def test_a_worker_that_was_restarted_takes_no_second_part(tmp_path: Path) -> None:
    for expected in ("used", "already"):
        journal = await asyncio.to_thread(Journal, tmp_path / "journal.json")
        async with AsyncExitStack() as stack:
            workers = [member("alice", journal=journal), *map(member, NAMES[1:])]
            for worker in workers:
                await stack.enter_async_context(worker)
            history = await _with_session(b"s" * 16, workers)
        outcomes = {site.site: site.outcome for site in history[0].sites}
        assert expected in outcomes["alice"]
        assert outcomes["bob"] == "used"


async def test_no_more_rounds_begin_than_the_roster_allows(tmp_path: Path) -> None:
    """Of any session, before or after a restart."""
    roster = Roster("clinics", 5, PUBLIC, bound=5.0, round_rate=3)
    for rounds, allowed in ((2, True), (2, False)):
        async with AsyncExitStack() as stack:
            workers = [member(name, 48, roster, await _journal(tmp_path / name)) for name in NAMES]
            for worker in workers:
                await stack.enter_async_context(worker)
            train = fit(network(), workers, rounds=rounds, privacy=federated.SecAgg(roster))
            if allowed:
                assert len(await train) == 2
            else:
                with pytest.raises(wsfed.SecAggAborted, match="3 rounds in 86400 s") as caught:
                    await train
                assert len(caught.value.history) == 1


async def _journal(path: Path) -> Journal:
    return await asyncio.to_thread(Journal, path)


async def test_a_worker_that_stays_lost_does_not_end_the_training(
    members: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = federated.SecAgg(ROSTER)
    await fit(network(), members, rounds=2, privacy=privacy)
    _lose(monkeypatch, {"erin": 0})
    history = await fit(network(4), members, rounds=3, privacy=privacy)
    for each in history:
        outcomes = {site.site: site.outcome for site in each.sites}
        assert "power cut" in outcomes.pop("erin")
        assert outcomes == dict.fromkeys(NAMES[:4], "used")


async def test_the_same_model_is_not_added_up_again_without_one_member(
    members: list[wsfed.Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the session: the difference of both means would be one member's change."""
    privacy = federated.SecAgg(ROSTER)
    for _ in range(2):  # with the same members it is
        await fit(network(), members, rounds=1, privacy=privacy)
    _lose(monkeypatch, {"erin": 0})
    with pytest.raises(wsfed.SecAggAborted, match=r"same model differ by 1 members \('erin'\)"):
        await fit(network(), members, rounds=1, privacy=privacy)


async def test_a_strict_owner_lets_no_worker_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(member(name, cohorts=CohortPolicy(moves=0)))
            for name in NAMES
        ]
        await fit(network(), workers, rounds=1, privacy=federated.SecAgg(ROSTER))
        _lose(monkeypatch, {"erin": 0})
        with pytest.raises(wsfed.SecAggAborted, match="signs the next epoch"):
            await fit(network(4), workers, rounds=1, privacy=federated.SecAgg(ROSTER))


async def _with_session(session: bytes, workers: Sequence[wsfed.Worker]) -> federated.History:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wsfed.federated.secure.secrets.token_bytes", lambda count: session)
        return await fit(network(), workers, rounds=1, privacy=federated.SecAgg(ROSTER))


# --- what fit refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"strategy": federated.Krum(1)}, "no single reply, which Krum needs"),
        ({"strategy": federated.Scaffold(0.1, 5)}, "which Scaffold needs"),
        ({"schedule": "async"}, "which FedAsync needs"),
        ({"schedule": "sequential"}, "train at once"),
        ({"late": "keep"}, "train at once"),
    ],
    ids=str,
)
async def test_what_needs_single_replies_is_refused(
    members: list[wsfed.Worker], more: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        await fit(network(), members, privacy=federated.SecAgg(ROSTER), **more)


async def test_a_worker_that_is_no_member_is_told(members: list[wsfed.Worker]) -> None:
    data = wsfed.Dataset("points", points(40, 9))
    async with wsfed.VirtualWorker("mallory", datasets=[data]) as mallory:
        with pytest.raises(wsfed.FederatedError, match="'mallory' is no member of a roster"):
            await fit(network(), [*members, mallory], privacy=federated.SecAgg(ROSTER))


@pytest.mark.parametrize("more", [{"attempts": 0}, {"patience": 0}])
def test_settings_out_of_range_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        federated.SecAgg(ROSTER, **more)
