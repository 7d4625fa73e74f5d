"""Joins two wires: what comes on one goes out on the other, unread, one message at a time.

A message is taken from one side only when the one before it has been handed to the other, so a
slow reader holds back whoever writes to it and nobody else, and a hub keeps a few messages of each
session at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits
from wsfed.relay.registry import Traffic
from wsfed.transport.wire import Wire, WireLost

__all__ = ["first", "splice"]


async def splice(client: Wire, node: Wire, *counted: Traffic) -> str:
    """Carry messages both ways until one side ends; closes both, and tells why."""

    def down(count: int) -> None:
        for each in counted:
            each.down += count

    def up(count: int) -> None:
        for each in counted:
            each.up += count

    for each in counted:
        each.sessions, each.begun = each.sessions + 1, each.begun + 1
    reason = "the hub is shutting down"
    try:
        reason = await first(_carry(client, node, down, "client"), _carry(node, client, up, "node"))
    finally:
        for each in counted:
            each.sessions -= 1
        await asyncio.gather(client.close(reason), node.close(reason))
    return reason


async def _carry(source: Wire, target: Wire, count: Callable[[int], None], who: str) -> str:
    while True:
        try:
            message = await source.receive()
        except WireLost as lost:
            return f"{who}-gone: {lost.reason}"
        except RemoteProtocolError as error:
            return f"{error.code}: the {who} broke the rules: {error.reason}"
        count(len(message))
        try:
            async with asyncio.timeout(limits.SILENCE_SECONDS):
                await target.send([message])
        except WireLost as lost:
            return f"{'node' if who == 'client' else 'client'}-gone: {lost.reason}"
        except TimeoutError:
            return "slow: the other side does not read"


async def first(*work: Coroutine[Any, Any, str]) -> str:
    """Run all until one is done, and give its result; the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
