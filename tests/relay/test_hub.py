"""A hub joins who belongs together, refuses the rest with a reason, and outlives everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch
import websockets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wsfed
from tests.relay.nodes import (
    abort,
    announcement,
    enrolled,
    enrolled_by_hand,
    joined,
    lines,
    rung,
    until,
)
from wsfed import testing
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import encode, pack
from wsfed.relay import Hub
from wsfed.testing import memory_wires
from wsfed.transport.line import Line, answer, call, open_line
from wsfed.transport.wire import SUBPROTOCOL, Wire, WireLost


@pytest.fixture
async def hub() -> Hub:
    return Hub()


@pytest.fixture
async def url(hub: Hub) -> AsyncIterator[str]:
    async with hub.listen() as where:
        yield where


async def refused(url: str, *sent: bytes) -> m.Refused:
    """What a hub answers to whoever sends this first."""
    wire = await testing.dial(url)
    line = Line(wire, asks=True)
    try:
        for each in sent:
            await wire.send([each])
        said = await line.hear()
    finally:
        await wire.close()
    assert isinstance(said, m.Refused)
    return said


def said(message: m.Message) -> bytes:
    return b"".join(encode(0, 0, [pack(message.wire())]))


async def calls(url: str, name: str) -> asyncio.Task[Wire]:
    return asyncio.ensure_future(call(url, name))


# --- joining -------------------------------------------------------------------------------------


async def test_what_one_side_sends_the_other_receives_unread(url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        client, node = await joined(url, line, await calls(url, "alice"))
        for one, other in ((client, node), (node, client)):
            for message in (b"", b"\xff" * 7, bytes(limits.MAX_FRAME_BYTES)):
                await one.send([message])
                assert bytes(await other.receive()) == message
        await client.close()
        await node.close()


async def test_many_sessions_of_one_node_are_kept_apart(url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        pairs = [await joined(url, line, await calls(url, "alice")) for _ in range(5)]
        for number, (client, _) in enumerate(pairs):
            await client.send([bytes([number])])
        for number, (_, node) in enumerate(pairs):
            assert bytes(await node.receive()) == bytes([number])
        for client, node in pairs:
            await client.close()
            await node.close()


async def test_a_slow_reader_holds_back_its_own_sender_and_nobody_else(hub: Hub, url: str) -> None:
    message = bytes(limits.CHUNK_BYTES)
    async with enrolled_by_hand(url, "slow") as slow, enrolled_by_hand(url, "quick") as quick:
        stuck, idle = await joined(url, slow, await calls(url, "slow"))
        client, node = await joined(url, quick, await calls(url, "quick"))
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in range(200):
                await stuck.send([message])
                sent += 1

        flooding = asyncio.create_task(flood())
        for _ in range(200):
            await client.send([message])
            assert bytes(await node.receive()) == message
        assert sent < 100, "at most what the wires and the hub's one message hold"
        assert hub.registry.members["slow"].traffic.down < 100 * len(message)
        for _ in range(200):
            await idle.receive()
        await flooding
        for wire in (client, node, stuck, idle):
            await wire.close()


# --- what breaks ---------------------------------------------------------------------------------


async def test_a_side_that_ends_is_the_end_of_the_other_with_a_reason(url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        for ends in (0, 1):
            pair = await joined(url, line, await calls(url, "alice"))
            await pair[ends].send([b"the last"])
            await pair[ends].close("enough")
            assert bytes(await pair[1 - ends].receive()) == b"the last"
            with pytest.raises(WireLost, match=f"{('client', 'node')[ends]}-gone: .*enough"):
                await pair[1 - ends].receive()
            await pair[1 - ends].close()


async def test_a_side_that_is_killed_in_the_middle_of_a_frame_is_the_end_of_the_other(
    hub: Hub, url: str
) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        for ends in (0, 1):
            pair = await joined(url, line, await calls(url, "alice"))
            transport = pair[ends]._socket.transport  # type: ignore[attr-defined]
            # The head of a binary frame of 60,000 bytes (masked, as clients do), and some of them.
            transport.write(b"\x82\xfe\xea\x60" + bytes(4) + bytes(1000))
            abort(pair[ends])
            with pytest.raises(WireLost, match=f"{('client', 'node')[ends]}-gone"):
                await pair[1 - ends].receive()
            await pair[1 - ends].close()
        await until(lambda: hub.registry.total.sessions == 0)
        assert hub.registry.total.up == hub.registry.total.down == 0


@pytest.mark.parametrize("leg", [0, 1])
async def test_a_cut_of_either_leg_is_no_loss_to_the_session(
    url: str, leg: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wires: list[Wire] = []

    async def noted(*args: object, **options: object) -> Wire:
        wires.append(await (call if leg == 0 else answer)(*args, **options))  # type: ignore[operator]
        return wires[-1]

    where = "wsfed.client.hub.call" if leg == 0 else "wsfed.node.enrolment.answer"
    monkeypatch.setattr(where, noted)
    async with enrolled(url, "alice"), wsfed.hub(url) as client:
        alice = await client.worker("alice")
        x = alice.send(torch.zeros(200_000))
        for step in range(4):
            x = x + 1
            if step in (1, 3):
                await alice.flush()
                x = x + 0
                abort(wires[-1])
        assert torch.equal(await x, torch.full((200_000,), 4.0))
        assert len(wires) > 1, "it was dialled again"


async def test_a_hub_that_is_started_again_on_its_port_goes_on_with_sessions() -> None:
    async with asyncio.timeout(60):
        async with Hub().listen() as url:
            port = int(url.rsplit(":", 1)[1])
            node = await wsfed.Node("alice").__aenter__()
            way = node.enrol(url)
            enrolment = await way.__aenter__()
            await enrolment.enrolled.wait()
            client = await wsfed.hub(url, reconnect=60)
            alice = await client.worker("alice")
            x = alice.send(torch.arange(3.0))
            assert torch.equal(await x, torch.arange(3.0))
        x = x + 1
        await until(lambda: not client.connected)
        async with Hub().listen(port=port):
            assert torch.equal(await x, torch.arange(3.0) + 1)
            assert [worker.id for worker in await client.wait_for(1)] == ["alice"]
            await client.close()
            await way.__aexit__(None, None, None)
            await node.__aexit__(None, None, None)


async def test_a_client_that_is_killed_leaves_the_nodes_session_to_be_resumed(url: str) -> None:
    async with enrolled(url, "alice") as (node,):
        wire = await call(url, "alice")
        await wire.send([said(m.Hello(m.VERSION, None, None, ""))])
        await wire.receive()
        assert node.info["sessions"] == 1
        abort(wire)
        (hosted,) = node._sessions.values()
        await until(lambda: hosted.protocol.state.value == "detached")
        assert node.info["sessions"] == 1


async def test_a_node_that_is_killed_is_gone_at_once(hub: Hub, url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        abort(line.wire)
        await until(lambda: not hub.registry.members)


async def test_a_node_that_is_silent_is_dropped(
    hub: Hub, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wsfed.hub(url) as client:
        events = client.events()
        monkeypatch.setattr(limits, "SILENCE_SECONDS", 0.1)
        async with enrolled_by_hand(url, "alice"):
            assert (await anext(events)).kind == "joined"
            left = await anext(events)
            assert (left.kind, left.node.id) == ("left", "alice")
            assert "nothing came" in left.reason


async def test_a_node_that_has_nothing_to_say_shows_that_it_lives(
    hub: Hub, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HEARTBEAT_SECONDS", 0.01)
    async with enrolled(url, "alice"):
        line = lines(hub)["alice"]
        for _ in range(3):
            line.heard.clear()
            await line.heard.wait()


# --- tickets -------------------------------------------------------------------------------------


async def test_a_ticket_is_good_once(url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        calling = await calls(url, "alice")
        ticket = await rung(line)
        node = await answer(url, ticket)
        with pytest.raises(WireLost, match="used, late or made up") as lost:
            await answer(url, ticket)
        assert lost.value.code == "ticket"
        client = await calling
        await client.send([b"still"])
        assert bytes(await node.receive()) == b"still"
        await client.close()
        await node.close()


async def test_a_forged_ticket_is_refused(url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        calling = await calls(url, "alice")
        ticket = await rung(line)
        for forged in (b"", bytes(32), ticket[:-1], ticket[:-1] + bytes([ticket[-1] ^ 1])):
            with pytest.raises(WireLost, match="used, late or made up"):
                await answer(url, forged)
        node = await answer(url, ticket)
        await (await calling).close()
        await node.close()


async def test_a_node_that_never_dials_back_is_told_to_the_client_and_its_ticket_is_void(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DIAL_BACK_SECONDS", 0.05)
    async with enrolled_by_hand(url, "alice") as line, wsfed.hub(url) as client:
        with pytest.raises(wsfed.NodeUnavailable, match="did not dial back within") as lost:
            await client.worker("alice")
        assert lost.value.code == "no-answer"
        with pytest.raises(WireLost, match="used, late or made up"):
            await answer(url, await rung(line))


async def test_a_hub_that_ends_does_not_leave_clients_waiting() -> None:
    async with Hub().listen() as url:
        line, _ = await open_line(url, announcement("alice"), (m.Enrolled,))
        calling = await calls(url, "alice")
        await rung(line)
    with pytest.raises(WireLost):
        await calling
    await line.wire.close()


async def test_a_client_that_goes_while_it_waits_leaves_nothing_behind(hub: Hub, url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        client = Line(await testing.dial(url), asks=True)
        await client.say(m.Call(m.VERSION, None, "alice"))
        ticket = await rung(line)
        abort(client.wire)
        try:
            node = await answer(url, ticket)
        except WireLost:
            pass  # the hub knew it already
        else:
            with pytest.raises(WireLost, match="client-gone"):
                await node.receive()
            await node.close()
        await until(lambda: not hub._calls and hub.registry.total.sessions == 0)


@pytest.mark.parametrize("limit", ["MAX_CALLS", "MAX_CALLS_OF_NODE"])
async def test_not_more_clients_wait_than_the_hub_can_bear(
    url: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, limit, 1)
    async with enrolled_by_hand(url, "alice") as line:
        first = await calls(url, "alice")
        ticket = await rung(line)
        with pytest.raises(WireLost, match="too many clients wait") as lost:
            await call(url, "alice")
        assert lost.value.code == "busy"
        node = await answer(url, ticket)
        client = await first
        second = await joined(url, line, await calls(url, "alice"))  # nobody waits any more
        for wire in (client, node, *second):
            await wire.close()


# --- names ---------------------------------------------------------------------------------------


async def test_a_name_belongs_to_the_node_that_is_there(url: str) -> None:
    async with enrolled(url, "alice"):
        other = wsfed.Node("alice")
        async with other, other.enrol(url) as enrolment:
            await enrolment.failed.wait()
            assert isinstance(enrolment.error, wsfed.EnrolmentRefused)
            assert enrolment.error.code == "taken"
            assert "another node 'alice' already" in str(enrolment.error)
        async with wsfed.hub(url) as client, client.worker("alice") as alice:
            await alice.flush()


async def test_the_same_node_takes_over_its_own_connection(hub: Hub, url: str) -> None:
    async with enrolled_by_hand(url, "alice") as before, enrolled_by_hand(url, "alice") as now:
        with pytest.raises(WireLost, match="connected anew"):
            await before.hear()
        client, node = await joined(url, now, await calls(url, "alice"))
        await client.close()
        await node.close()
        assert list(hub.registry.members) == ["alice"]


async def test_a_name_is_free_again_when_its_node_does_not_answer(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PROBE_SECONDS", 0.05)
    async with wsfed.hub(url) as client:
        events = client.events()
        async with (
            enrolled_by_hand(url, "alice", b"1" * 16),
            enrolled_by_hand(url, "alice", b"2" * 16) as now,
        ):
            told = [await anext(events) for _ in range(3)]
            assert [event.kind for event in told] == ["joined", "left", "joined"]
            assert "did not answer" in told[1].reason
            client_wire, node = await joined(url, now, await calls(url, "alice"))
            await client_wire.close()
            await node.close()


async def test_a_full_hub_says_so_and_takes_the_node_when_there_is_room() -> None:
    async with Hub(most_nodes=1).listen() as url:
        async with enrolled_by_hand(url, "alice"):
            with pytest.raises(WireLost, match="has 1 nodes and takes no more") as lost:
                await open_line(url, announcement("bob"), (m.Enrolled,))
            assert lost.value.code == "busy"
            node = wsfed.Node("bob")
            way = node.enrol(url)
            enrolment = await way.__aenter__()
        await enrolment.enrolled.wait()
        await way.__aexit__(None, None, None)


# --- garbage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "code", "says"),
    [
        (b"", "malformed", "at least 4 bytes"),
        (b"\xff" * 100, "malformed", "does not fit"),
        (said(m.Ring(b"")), "unexpected", "Ring begins nothing here"),
        (said(m.Flush(1)), "unexpected", "Flush is not expected here"),
        (encode(1, 0, [pack(m.Ack().wire())])[0], "unexpected", "one message at a time"),
        (encode(0, 0, [pack([96, 1, None])])[0], "malformed", "Enrol has 7 fields"),
        (said(m.Enrol(1, None, "\x1b[2J", b"", "t", [], [])), "malformed", "has to be a name"),
        (said(m.Enrol(1, None, "a", b"", "t", ["x"] * 99, [])), "malformed", "at most 32 names"),
        (said(m.Enrol(2, None, "a", b"", "t", [], [])), "version", "not 2; install the same"),
        (said(m.Call(9, None, "a")), "version", "not 9"),
        (said(m.Call(1, None, "a")), "no-node", "none is enrolled"),
        (bytes(limits.MAX_HUB_BYTES + 1), "message-size", "at most 32,768 bytes"),
    ],
)
async def test_what_is_no_greeting_is_refused_with_a_reason(
    hub: Hub, url: str, sent: bytes, code: str, says: str
) -> None:
    answer = await refused(url, sent)
    assert (answer.error, says in answer.reason) == (code, True), answer
    assert not hub.registry.members


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
VALUE = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=8), max_leaves=20)
HUB_CODES = [code for code, cls in m.BY_CODE.items() if cls.kind == m.HUB]


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    greeting=st.binary(max_size=200)
    | st.builds(
        lambda code, fields: encode(0, 0, [pack([code, *fields])])[0],
        st.sampled_from(HUB_CODES) | st.integers(0, 128),
        st.lists(VALUE, max_size=8),
    )
)
async def test_any_bytes_end_a_connection_and_not_the_hub(greeting: bytes) -> None:
    hub = Hub()
    near, far = memory_wires()
    await near.send([greeting])
    await near.close()
    await hub.serve(far)
    assert not hub.registry.members and not hub._calls


async def test_an_announcement_of_ten_megabytes_is_cut_off(hub: Hub, url: str) -> None:
    wire = await testing.dial(url)
    with pytest.raises(WireLost):
        await wire.send([bytes(10_000_000)])
        await wire.receive()
        await wire.receive()
    await wire.close()
    assert not hub.registry.members
    async with enrolled_by_hand(url, "alice"):
        assert list(hub.registry.members) == ["alice"], "the hub goes on"


async def test_a_message_that_is_too_large_ends_its_session_and_no_other(url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        client, node = await joined(url, line, await calls(url, "alice"))
        other = await joined(url, line, await calls(url, "alice"))
        await client.send([bytes(limits.MAX_FRAME_BYTES + 1)])
        with pytest.raises(WireLost, match="frame-size: the client broke the rules"):
            await node.receive()
        await other[0].send([b"fine"])
        assert bytes(await other[1].receive()) == b"fine"
        for wire in (client, node, *other):
            await wire.close()


async def test_a_node_that_says_what_it_should_not_is_dropped(hub: Hub, url: str) -> None:
    async with enrolled_by_hand(url, "alice") as line:
        await line.say(m.Call(m.VERSION, None, "alice"))
        told = await line.hear()
        assert isinstance(told, m.Refused) and "Call is not expected of a node" in told.reason
        await until(lambda: not hub.registry.members)


async def test_who_says_nothing_is_left(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_SECONDS", 0.05)
    wire = await testing.dial(url)
    with pytest.raises(WireLost):
        await wire.receive()
    await wire.close()


# --- browsers ------------------------------------------------------------------------------------


async def test_pages_of_other_origins_do_not_connect() -> None:
    async def connect(url: str, origin: str | None) -> None:
        async with websockets.connect(url, origin=origin, subprotocols=[SUBPROTOCOL]):  # type: ignore[arg-type, list-item]
            pass

    async with Hub(origins=["https://clinic.example"]).listen() as url:
        await connect(url, None)
        await connect(url, "https://clinic.example")
        for foreign in ("https://evil.example", "null", url.replace("ws:", "http:")):
            with pytest.raises(websockets.InvalidStatus) as caught:
                await connect(url, foreign)
            assert caught.value.response.status_code == 403
    async with wsfed.Node("bob") as node, node.listen() as url:
        with pytest.raises(websockets.InvalidStatus):
            await connect(url, "https://clinic.example")
