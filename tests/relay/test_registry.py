"""The registry: one node a name, and whoever watches misses nothing or is told so."""

from __future__ import annotations

import dataclasses

import pytest

from tests.relay.nodes import announcement
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.relay.registry import Member, Refusal, Registry
from wsfed.transport.line import Line
from wsfed.transport.memory import pair


def member(name: str, since: int = 0) -> Member:
    return Member(announcement(name), Line(pair()[0], asks=False), since)


async def test_a_watcher_is_told_who_is_there_and_then_what_happens() -> None:
    registry = Registry()
    alice, bob = member("alice"), member("bob")
    registry.add(alice)
    watcher = registry.watch()
    registry.add(bob)
    registry.remove(alice, "it left")
    assert [await watcher.next() for _ in range(4)] == [
        alice.joined(),
        m.Present(),
        bob.joined(),
        m.Left("alice", "it left"),
    ]


async def test_who_takes_over_keeps_the_count_and_is_not_removed_by_the_one_before() -> None:
    registry = Registry()
    before, now = member("alice"), member("alice")
    registry.add(before)
    before.traffic.begun = 7
    watcher = registry.watch()
    registry.add(now)
    registry.remove(before, "its connection broke")
    assert registry.find("alice") is now
    assert now.traffic.begun == 7
    registry.remove(now, "it left")
    told = [await watcher.next() for _ in range(3)]
    assert told == [before.joined(), m.Present(), m.Left("alice", "it left")]


async def test_who_takes_over_with_other_tags_is_announced_anew() -> None:
    registry = Registry()
    now = member("alice")
    now.announced = dataclasses.replace(now.announced, tags=["letters"])
    registry.add(member("alice"))
    watcher = registry.watch()
    registry.add(now)
    assert [await watcher.next() for _ in range(3)][-1] == now.joined()


async def test_a_watcher_that_does_not_read_is_ended_and_keeps_nothing() -> None:
    registry = Registry(most=1)
    watcher = registry.watch()
    for _ in range(10_000):
        alice = member("alice")
        registry.add(alice)
        registry.remove(alice, "")
    with pytest.raises(Refusal, match="left unread"):
        await watcher.next()
    assert len(watcher._news) < 2000


def test_a_missing_node_is_told_with_some_that_are_there() -> None:
    registry = Registry()
    with pytest.raises(Refusal, match="none is enrolled"):
        registry.find("x")
    for number in range(15):
        registry.add(member(f"n{number}"))
    with pytest.raises(Refusal, match=r"there is 'n0', .*'n9' and 5 more"):
        registry.find("x")


def test_there_are_not_more_watchers_than_the_hub_can_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_WATCHERS", 1)
    registry = Registry()
    watcher = registry.watch()
    with pytest.raises(Refusal, match="too many clients"):
        registry.watch()
    registry.unwatch(watcher)
    registry.watch()
