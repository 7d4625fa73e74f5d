"""Workers that are slow, or gone, cost a round its deadline at most, and training goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wsfed
from tests.federated.rows import points
from wsfed import federated
from wsfed.federated.network import Network, Setup
from wsfed.federated.recipe import Recipe
from wsfed.testing import worker_process

SGD = partial(torch.optim.SGD, lr=0.1)
ARGUMENTS: Any = ("points", F.cross_entropy, SGD)


@pytest.fixture
async def eight() -> AsyncIterator[list[str]]:
    """URLs of eight nodes in this process."""
    async with AsyncExitStack() as stack:
        urls = []
        for number in range(8):
            data = wsfed.Dataset("points", points(64, number))
            node = await stack.enter_async_context(wsfed.Node(f"node-{number}", datasets=[data]))
            urls.append(await stack.enter_async_context(node.listen()))
        yield urls


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    file = tmp_path_factory.mktemp("data") / "points.npz"
    np.savez(file, **{name: value.numpy() for name, value in points(64, 9).items()})
    with ExitStack() as stack:
        yield [
            stack.enter_context(worker_process("--id", name, "--dataset", f"points={file}"))
            for name in ("killed", "slow")
        ]


class _Struck(federated.Callback):
    """In the middle of round 2 one worker is killed, and one stands still until round 4."""

    def __init__(self, killed: int, slow: int) -> None:
        self.killed, self.slow = killed, slow
        self.round = 0

    def round_begins(self, number: int, sites: list[str]) -> None:
        self.round = number
        if number == 4:
            os.kill(self.slow, signal.SIGCONT)

    def batch_done(self, site: str, progress: wsfed.Progress) -> None:
        if self.round == 2 and progress.done == 1:
            if site == "killed":
                os.kill(self.killed, signal.SIGKILL)
            if site == "slow":
                os.kill(self.slow, signal.SIGSTOP)


@pytest.mark.processes
async def test_of_ten_workers_one_is_killed_and_one_slow(
    eight: list[str], two_processes: list[dict[str, Any]]
) -> None:
    urls = [*eight, *(each["url"] for each in two_processes)]
    workers = [partial(wsfed.connect, url, reconnect=0.2) for url in urls]
    struck = _Struck(*(each["pid"] for each in two_processes))
    model = nn.Linear(4, 2)
    more: dict[str, Any] = {"local_epochs": 25, "min_workers": 8}
    warm = await federated.fit(*(model, workers, *ARGUMENTS), rounds=2, **more)
    deadline = 2 + 3 * warm[1].seconds  # the machine may be busy with other things
    try:
        history = await federated.fit(
            *(model, workers, *ARGUMENTS),
            rounds=5,
            deadline=deadline,
            callbacks=[struck],
            **more,
        )
    finally:
        os.kill(struck.slow, signal.SIGCONT)
    outcomes = [{site.site: site.outcome for site in each.sites} for each in history]
    assert set(outcomes[0].values()) == {"used"}
    assert len(outcomes[0]) == 10
    assert "lost" in outcomes[1]["killed"]
    assert outcomes[1]["slow"] == "late"
    assert outcomes[2] == {name: "used" for name in outcomes[2] if name != "slow"} | {
        "slow": "late"
    }
    assert "killed" not in outcomes[2]
    assert outcomes[4]["slow"] == "used"  # it has caught up
    assert all(each.seconds < 2 * deadline for each in history)
    assert history[-1].loss < history[0].loss


async def test_too_few_replies_end_training_in_time(eight: list[str]) -> None:
    model = nn.Linear(4, 2)
    begun = time.monotonic()
    with pytest.raises(wsfed.TooFewSites) as caught:
        await federated.fit(
            *(model, [partial(wsfed.connect, url) for url in eight[:3]], *ARGUMENTS),
            rounds=2,
            local_epochs=100_000,
            deadline=0.5,
            min_workers=2,
        )
    assert time.monotonic() - begun < 30
    assert caught.value.missing == {f"node-{number}": "late" for number in range(3)}
    assert (caught.value.round, caught.value.replied, caught.value.needed) == (1, 0, 2)


async def test_a_round_closes_with_the_replies_it_wants(eight: list[str]) -> None:
    history = await federated.fit(
        *(nn.Linear(4, 2), [partial(wsfed.connect, url) for url in eight], *ARGUMENTS),
        rounds=3,
        sampler=federated.Uniform(count=4, extra=0.5),
    )
    for each in history:
        assert len(each.sites) == 6
        assert sum(site.outcome == "used" for site in each.sites) >= 4
        assert {site.outcome for site in each.sites} <= {"used", "spare"}


async def test_late_replies_count_in_a_later_round() -> None:
    """Of two sites one has a thousand times the rows: it needs the better part of a second."""

    class UntilOneWasLate(federated.Callback):
        def round_ends(self, round: federated.Round, history: federated.History) -> str | None:
            stale = [site.site for site in round.sites if site.staleness > 0]
            return "a late reply counted" if stale == ["slow"] else None

    data = [wsfed.Dataset("points", points(rows, 0)) for rows in (64, 64_000)]
    async with (
        wsfed.VirtualWorker("quick", datasets=data[:1]) as quick,
        wsfed.VirtualWorker("slow", datasets=data[1:]) as slow,
    ):
        warm = await federated.fit(*(nn.Linear(4, 2), [quick, slow], *ARGUMENTS), rounds=2)
        needs = {site.site: site.seconds for site in warm[1].sites}
        history = await federated.fit(
            *(nn.Linear(4, 2), [quick, slow], *ARGUMENTS),
            rounds=40,
            deadline=needs["slow"] / 2,
            late="keep",
            callbacks=[UntilOneWasLate()],
        )
    assert history.stopped == "a late reply counted"
    late = [site for each in history for site in each.sites if site.site == "slow"]
    assert all(site.outcome == "used" for site in late)


async def test_a_site_whose_connection_is_down_is_not_asked(eight: list[str]) -> None:
    setup = Setup("points", None, Recipe(F.cross_entropy, SGD))
    opened = [partial(wsfed.connect, url) for url in eight[:3]]
    async with Network(opened, nn.Linear(4, 2), setup) as network:
        link = network.sites[1].worker.link
        link._is_connected = False
        assert [each.site for each in network.candidates] == ["node-0", "node-2"]
        await network.settle(2)  # enough are there
        waiting = asyncio.create_task(network.settle(3))
        await asyncio.sleep(0)
        assert not waiting.done()
        link._is_connected = True
        await waiting
        assert len(network.candidates) == 3
        await network.sites[0].worker.close()
        await network.settle(3)  # nobody tries to get that one back
        assert [each.site for each in network.candidates] == ["node-1", "node-2"]
        assert network.lost == {"node-0": "its connection is lost"}


class _Ending(federated.Callback):
    """In the middle of round 2 a node ends."""

    def __init__(self, node: AsyncExitStack) -> None:
        self.node = node
        self.round = 0
        self.task: asyncio.Task[None] | None = None

    def round_begins(self, number: int, sites: list[str]) -> None:
        self.round = number

    def batch_done(self, site: str, progress: wsfed.Progress) -> None:
        if self.round == 2 and site == "alice" and self.task is None:
            self.task = asyncio.create_task(self.node.aclose())


async def test_what_was_lost_is_opened_again(eight: list[str]) -> None:
    async def start(stack: AsyncExitStack) -> str:
        data = wsfed.Dataset("points", points(64, 0))
        node = await stack.enter_async_context(wsfed.Node("alice", datasets=[data]))
        return await stack.enter_async_context(node.listen())

    async with AsyncExitStack() as first, AsyncExitStack() as second:
        urls = [await start(first), await start(second)]
        opened: list[str] = []

        @asynccontextmanager
        async def alice() -> AsyncIterator[wsfed.Worker]:
            opened.append(urls[len(opened)])
            async with wsfed.connect(opened[-1], reconnect=0) as worker:
                yield worker

        ending = _Ending(first)
        history = await federated.fit(
            *(nn.Linear(4, 2), [partial(wsfed.connect, eight[0]), alice], *ARGUMENTS),
            rounds=4,
            local_epochs=400,
            callbacks=[ending],
        )
        assert ending.task is not None
        await ending.task
    outcomes = [{site.site: site.outcome for site in each.sites} for each in history]
    assert outcomes[0] == outcomes[2] == outcomes[3] == {"alice": "used", "node-0": "used"}
    assert "lost" in outcomes[1]["alice"]
    assert opened == urls


async def test_what_stays_lost_is_named(eight: list[str]) -> None:
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(
            wsfed.Node("alice", datasets=[wsfed.Dataset("points", points(64, 0))])
        )
        alice = await stack.enter_async_context(node.listen())
        with pytest.raises(wsfed.TooFewSites, match=r"alice.*lost") as caught:
            await federated.fit(
                *(
                    nn.Linear(4, 2),
                    [partial(wsfed.connect, url, reconnect=0) for url in (alice, eight[0])],
                ),
                *ARGUMENTS,
                rounds=4,
                local_epochs=400,
                min_workers=2,
                callbacks=[_Ending(stack)],
            )
    assert caught.value.round == 2
    assert len(caught.value.history) == 1
