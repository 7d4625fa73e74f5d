"""A strict worker: what leaves is a release, and everything else stays."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import points
from wsfed import federated
from wsfed.errors import FederatedError, GetNotPermitted, NotFound, RemoteError
from wsfed.pointers.link import link_of
from wsfed.pointers.pointer import make_pointer, make_sent
from wsfed.protocol import messages as m
from wsfed.worker.strict import Ledger, Releases, Vault, parse_releases

RULES = Releases(clip=0.5, noise=0.1)
ROWS = points(60, 1)


def strict(rules: Releases = RULES, path: Path | None = None, id: str = "clinic") -> Any:
    data = [wsfed.Dataset("points", ROWS), wsfed.Dataset("open", ROWS, open=True)]
    return wsfed.VirtualWorker(id, datasets=data, ledger=Ledger(rules, path))


@pytest.fixture
async def clinic() -> AsyncIterator[wsfed.Worker]:
    async with strict() as worker:
        yield worker


async def touched(worker: wsfed.Worker) -> Any:
    """The rows, from now on in use."""
    data = await worker.dataset("points")
    x, _ = data.batch(60, 0)
    return x


def release(worker: wsfed.Worker, values: Any, given: Any, clip: float, noise: float) -> Any:
    link = link_of(worker)
    out = link.new_id()
    command = m.Release([values._handle.id], [given._handle.id], [out], clip, noise)
    link.issue(command.wire())
    return make_pointer(link, out, values.shape, values.dtype)


# --- what stays -----------------------------------------------------------------------------------


async def test_before_rows_are_used_all_is_as_ever(clinic: wsfed.Worker) -> None:
    sent = clinic.send(torch.arange(3.0))
    assert (await (sent * 2)).tolist() == [0.0, 2.0, 4.0]
    public = (await clinic.dataset("open")).batch(4, 0)[0]
    assert torch.equal(await public, ROWS["x"][:4])


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, sent: x.sum(),
        lambda x, sent: x.mean(0),
        lambda x, sent: torch.zeros_like(sent),
        lambda x, sent: sent + 0,
        lambda x, sent: sent,
    ],
)
async def test_nothing_that_is_computed_beside_rows_leaves(
    clinic: wsfed.Worker, compute: Any
) -> None:
    sent = clinic.send(torch.ones(4))
    x = await touched(clinic)
    with pytest.raises(GetNotPermitted):
        await compute(x, sent)


async def test_gradients_and_trained_modules_stay(clinic: wsfed.Worker) -> None:
    model = clinic.send(nn.Linear(4, 1))
    x = await touched(clinic)
    model(x).sum().backward()
    with pytest.raises(GetNotPermitted):
        await model.weight.grad
    with pytest.raises(GetNotPermitted):
        await wsfed.get(model)


async def test_nothing_moves_is_described_or_found(clinic: wsfed.Worker) -> None:
    async with wsfed.VirtualWorker("thief") as thief:
        x = await touched(clinic)
        told = (x > 0).sum().tag("#count")
        assert not list(await clinic.search("#count"))
        with pytest.raises(GetNotPermitted):
            await wsfed.move(told, thief)
            await told
        with pytest.raises(GetNotPermitted, match=r"told of|nothing leave"):
            await torch.nonzero(x > 0).resolve()


async def test_a_run_reports_no_numbers(clinic: wsfed.Worker) -> None:
    data = await clinic.dataset("points")
    first = wsfed.plan(lambda x, y: x.sum())
    found = await data.run(first, batch_size=30)
    assert found.isnan().tolist() == [True, True]
    with pytest.raises(GetNotPermitted):
        await data.run(first, batch_size=30, until=lambda value: value > 0)


# --- what is released -----------------------------------------------------------------------------


async def test_a_release_is_the_change_clipped_with_noise() -> None:
    rules = Releases(clip=0.5, noise=1e-9)
    async with strict(rules) as clinic:
        link = link_of(clinic)
        base = torch.tensor([1.0, 2.0, 3.0, 4.0])
        given = make_sent(link, base, sealed=True)
        x = await touched(clinic)
        total = x.sum(0)
        for clip in (0.5, 0.2):
            released = await release(clinic, given + total, given, clip, 1e-9)
            change = released - base
            wanted = ROWS["x"].sum(0)
            assert torch.allclose(change, wanted * (clip / wanted.norm()), atol=1e-6)
        near = await release(clinic, given + 0.125, given, 0.5, 1e-9)
        assert torch.allclose(near, base + 0.125)
        count = torch.tensor([3, 4])
        kept = make_sent(link, count, sealed=True)
        assert torch.equal(await release(clinic, kept + 1, kept, 0.5, 1e-9), count)
        assert torch.equal(await given, base)  # what was sealed is as it was sent


async def test_the_noise_is_as_large_as_it_is_said_to_be() -> None:
    async with strict(Releases(clip=2.0, noise=0.5)) as clinic:
        base = torch.zeros(20_000)
        given = make_sent(link_of(clinic), base, sealed=True)
        await touched(clinic)
        drawn = [await release(clinic, given * 1, given, 2.0, noise) for noise in (0.5, 0.5, 1.5)]
        assert [float(each.std()) for each in drawn] == pytest.approx([1.0, 1.0, 3.0], rel=0.03)
        assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("clip", "noise"), [(0.6, 0.1), (0.5, 0.05), (math.inf, 0.1), (0.5, math.nan), (0.0, 1.0)]
)
async def test_a_release_weaker_than_the_rules_is_refused(
    clinic: wsfed.Worker, clip: float, noise: float
) -> None:
    given = make_sent(link_of(clinic), torch.zeros(4), sealed=True)
    x = await touched(clinic)
    with pytest.raises(GetNotPermitted, match=r"weaker than the owner's clip=0\.5"):
        await release(clinic, x.sum(0), given, clip, noise)


async def test_the_base_of_a_release_is_what_the_client_has_sent(clinic: wsfed.Worker) -> None:
    """Rows that are written into it, or under its name, do not become part of a release."""
    link, zeros = link_of(clinic), torch.zeros(4)
    sealed, plain = make_sent(link, zeros, sealed=True), make_sent(link, zeros)
    x = await touched(clinic)
    with pytest.raises(GetNotPermitted, match="has to be sealed"):
        await release(clinic, x.sum(0), plain, 0.5, 0.1)
    sealed.copy_(x[0] * 1e6)
    sealed.data.copy_(x[0] * 1e6)
    F.batch_norm(x.repeat(2, 1), sealed, torch.ones_like(sealed), training=True, momentum=1.0)
    released = await release(clinic, sealed, sealed, 0.5, 0.1)
    assert float(released.norm()) < 2
    assert torch.equal(await sealed, zeros)
    written = release(clinic, sealed, sealed, 0.5, 0.1)
    before = await written
    written.copy_(x[0] * 1e6)
    assert torch.equal(await written, before)


async def test_a_change_that_is_not_finite_is_noise(clinic: wsfed.Worker) -> None:
    given = make_sent(link_of(clinic), torch.zeros(4), sealed=True)
    x = await touched(clinic)
    for factor in (math.inf, math.nan, 1e38):
        released = await release(clinic, x.sum(0) * factor * 10, given, 0.5, 0.1)
        assert released.isfinite().all()
        assert float(released.norm()) < 2


async def test_a_failure_ends_releases(clinic: wsfed.Worker) -> None:
    """Whether an index is in range would be told once for each release."""
    given = make_sent(link_of(clinic), torch.zeros(4), sealed=True)
    x = await touched(clinic)
    with pytest.raises(RemoteError) as caught:
        await torch.zeros_like(x)[(x[0, :1] * 1e6).long()]
    assert "e+" not in str(caught.value)
    with pytest.raises(GetNotPermitted, match="connect again"):
        await release(clinic, x.sum(0), given, 0.5, 0.1)


async def test_an_ordinary_worker_releases_nothing() -> None:
    async with wsfed.VirtualWorker("bob") as bob:
        given = make_sent(link_of(bob), torch.zeros(4), sealed=True)
        assert bob.info["releases"] is None
        with pytest.raises(RemoteError, match="no rules for releases"):
            await release(bob, given + 1, given, 0.5, 0.1)


async def test_what_is_deleted_is_forgotten(clinic: wsfed.Worker) -> None:
    link = link_of(clinic)
    given = make_sent(link, torch.zeros(4), sealed=True)
    x = await touched(clinic)
    id = given._handle.id
    del given
    await clinic.flush()
    link.issue(m.Delete([id]).wire())
    ghost = make_pointer(link, id, (4,), torch.float32)
    with pytest.raises(NotFound):
        await ghost
    with pytest.raises(GetNotPermitted, match="sealed"):
        await release(clinic, x.sum(0), ghost, 0.5, 0.1)


# --- the ledger -----------------------------------------------------------------------------------


def epsilon(noises: list[float], delta: float = 1e-5) -> float:
    accountant = RDPAccountant()
    for noise in noises:
        accountant.step(noise_multiplier=noise, sample_rate=1.0)
    return float(accountant.get_epsilon(delta))


def test_the_ledger_outlives_the_worker(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    rules = Releases(noise=2.0, budget=epsilon([2.0, 2.0, 4.0]) + 1e-6)
    ledger = Ledger(rules, path)
    ledger.spend(["a"], 2.0)
    ledger.spend(["a", "b"], 4.0)
    again = Ledger(rules, path)
    assert again.epsilon("a") == pytest.approx(epsilon([2.0, 4.0]))
    assert again.epsilon("b") == pytest.approx(epsilon([4.0]))
    assert again.epsilon("c") == 0.0
    again.spend(["a"], 2.0)
    with pytest.raises(GetNotPermitted, match="budget of the data set 'a' is spent"):
        again.spend(["a", "b"], 4.0)
    assert Ledger(rules, path).epsilon("b") == pytest.approx(epsilon([4.0]))  # nothing was spent
    assert json.loads(path.read_text())["b"] == [[4.0, 1]]


def test_a_damaged_ledger_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    for text in ("[]", "{", '{"a": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no ledger"):
            Ledger(RULES, path)


@pytest.mark.blocking  # the owner's file is read
async def test_sessions_share_a_budget(tmp_path: Path) -> None:
    rules = Releases(clip=0.5, noise=2.0, budget=epsilon([2.0, 2.0]) + 1e-6)
    for number in range(3):
        async with strict(rules, tmp_path / "ledger.json") as clinic:
            given = make_sent(link_of(clinic), torch.zeros(4), sealed=True)
            x = await touched(clinic)
            released = release(clinic, x.sum(0), given, 0.5, 2.0)
            if number < 2:
                await released
            else:
                with pytest.raises(GetNotPermitted, match="budget"):
                    await released


def test_memory_of_copies_counts() -> None:
    vault = Vault(Ledger(RULES))
    vault.seal(1, torch.zeros(8))
    assert vault.nbytes == 32
    vault.forget([1, 2])
    assert vault.nbytes == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("clip", "''"),
        ("clip=x", "'x' is no number"),
        ("clip=1,clip=2", "is not clip="),
        ("norm=1", "is not clip="),
        ("clip=0", "positive"),
        ("noise=0", "positive"),
        ("budget=-1", "a budget is positive"),
    ],
)
def test_rules_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_releases(text)
    assert parse_releases("clip=2,noise=0.5,budget=8") == Releases(2.0, 0.5, budget=8.0)


# --- training -------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


async def fit(workers: list[wsfed.Worker], **more: Any) -> tuple[nn.Module, federated.History]:
    model = network()
    arguments: dict[str, Any] = {"rounds": 4, "batch_size": 12, "validation": None, **more}
    sgd = partial(torch.optim.SGD, lr=0.3)
    history = await federated.fit(model, workers, "points", F.cross_entropy, sgd, **arguments)
    return model, history


async def test_training_needs_releases_alone() -> None:
    rules = Releases(clip=2.0, noise=0.02)
    async with strict(rules, id="a") as one, strict(rules, id="b") as other:
        for more in (
            {},
            {"privacy": federated.DP(clip=5.0, noise=0.5)},
            {"strategy": federated.FedAdam(lr=0.1)},
            {"schedule": "sequential"},
            {"schedule": "async"},
        ):
            model, history = await fit([one, other], **more)
            assert all(math.isnan(each) for each in history.series("loss"))
        held = points(300, 9)
        model, _ = await fit([one, other], rounds=12)
        model.eval()
        accuracy = (model(held["x"]).argmax(1) == held["y"]).double().mean()
        assert accuracy > 0.8


async def test_one_round_changes_no_more_than_the_rules_let() -> None:
    async with strict(Releases(clip=0.05, noise=1e-9)) as clinic:
        model, _ = await fit([clinic], rounds=1)
        pairs = zip(model.parameters(), network().parameters(), strict=True)
        change = torch.cat([(one - other).reshape(-1) for one, other in pairs])
        assert 0.001 < float(change.detach().norm()) <= 0.05 + 1e-6


async def test_a_spent_budget_ends_training_with_the_model_of_before() -> None:
    rules = Releases(clip=0.5, noise=2.0, budget=epsilon([2.0] * 3) + 1e-6)
    async with strict(rules) as clinic:
        _, history = await fit([clinic], rounds=9)
        assert len(history) == 3
        assert "the privacy budget of the data set 'points' is spent" in history.stopped
        with pytest.raises(wsfed.BudgetSpent, match="the owner decides"):
            await fit([clinic])


async def test_what_needs_more_than_releases_is_told(clinic: wsfed.Worker) -> None:
    for more, text in (
        ({"strategy": federated.FedSGD(0.1)}, "FedSGD needs more"),
        ({"strategy": federated.QFedAvg()}, "QFedAvg needs more"),
        ({"privacy": federated.DP(quantile=0.5)}, "bound that adapts needs more"),
        ({"compression": "fp16"}, "compression needs more"),
    ):
        with pytest.raises(FederatedError, match=text):
            await fit([clinic], **more)
