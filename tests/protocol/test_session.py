"""The session survives cuts at every byte and executes every command exactly once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.pair import EPOCH, Numbers, Pair, memory, put_flushes
from wsfed.errors import LocalProtocolError, RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Outgoing, encode, pack
from wsfed.protocol.session import (
    TRANSITIONS,
    CancelAsked,
    Ended,
    Input,
    Lost,
    RefusedByPeer,
    Role,
    Session,
    Silent,
    State,
    read_greeting,
)

#: Above the inline size, so that it travels in chunks.
LARGE = limits.INLINE_BYTES + 1000


def put_tensor(session: Session, id: int, data: bytes) -> None:
    store = m.Store(id, 0, False, False)
    session.sender.put_tensor(
        lambda place: store.wire(tensor=place),
        Outgoing("uint8", (len(data),), memoryview(data)),
    )


def control(message: m.Message) -> bytes:
    return b"".join(encode(0, 0, [pack(message.wire())]))


def live_pair() -> Pair:
    pair = Pair()
    pair.connect()
    pair.run()
    assert pair.client.state is State.LIVE and pair.worker.state is State.LIVE
    return pair


def test_commands_are_executed_in_order_and_answered() -> None:
    pair = live_pair()
    put_flushes(pair.client, range(1, 6))
    pair.run()
    assert pair.executed == pair.replies == [1, 2, 3, 4, 5]
    assert pair.client.sender.idle and pair.worker.sender.idle


def exchange(cut_up: int | None, cut_down: int | None) -> Pair:
    """A conversation of five commands and one large tensor, cut once at the given bytes."""
    pair = Pair()
    pair.connect()
    pair.up.left, pair.down.left = cut_up, cut_down
    pair.run()
    put_flushes(pair.client, range(1, 4))
    pair.run()
    put_flushes(pair.client, range(4, 6))
    put_tensor(pair.client, 6, b"t" * 300)
    pair.run()
    if cut_up is not None or cut_down is not None:
        pair.cut()
        pair.connect()
        pair.run()
    return pair


def lengths() -> tuple[int, int]:
    whole = exchange(None, None)
    return whole.bytes_up, whole.bytes_down


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_a_cut_at_every_byte_loses_and_repeats_nothing(direction: str) -> None:
    up, down = lengths()
    for offset in range(max(up, down) + 1):
        cut_up = offset if direction in ("up", "both") else None
        cut_down = offset if direction in ("down", "both") else None
        pair = exchange(cut_up, cut_down)
        assert pair.executed == [1, 2, 3, 4, 5, 6], offset
        assert pair.replies == [1, 2, 3, 4, 5], offset
        assert pair.values == [b"t" * 300], offset


@settings(max_examples=150, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 700_000), st.integers(0, 3000)), min_size=1, max_size=8)
)
def test_many_cuts_of_a_chunked_upload_lose_and_repeat_nothing(
    cuts: list[tuple[int, int]],
) -> None:
    data = bytes(range(256)) * (LARGE // 256 + 1)
    pair = Pair()
    put_flushes(pair.client, range(1, 4))
    put_tensor(pair.client, 4, data)
    put_flushes(pair.client, range(5, 8))
    for up, down in cuts:
        pair.connect()
        pair.up.left, pair.down.left = up, down
        pair.run()
        pair.cut()
    pair.connect()
    pair.run()
    assert pair.executed == [1, 2, 3, 4, 5, 6, 7]
    assert pair.replies == [1, 2, 3, 5, 6, 7]
    assert pair.values == [data]


def test_the_window_is_never_exceeded_and_opens_with_processing() -> None:
    pair = live_pair()
    for number in range(1, limits.WINDOW_FRAMES * 2):
        put_tensor(pair.client, number, b"x" * (limits.INLINE_BYTES - 100))
    sent = 0
    while (frame := pair.client.next_frame(0.0)) is not None:
        sent += sum(map(len, frame))
    assert limits.WINDOW_BYTES <= sent <= limits.WINDOW_BYTES + limits.MAX_FRAME_BYTES


def test_acknowledgement_comes_with_or_behind_the_replies() -> None:
    pair = live_pair()
    put_flushes(pair.client, range(1, 2))
    pair._send(pair.client, pair.up)
    (frame,) = pair.up.arrived()
    (delivery,) = pair.worker.receive(frame, 0.0)
    pair.worker.sender.put(m.ValueReply(1, None).wire())
    assert pair.worker.receiver.processed == 0
    pair.worker.processed(delivery.seq)  # type: ignore[union-attr]
    assert pair.worker.receiver.processed == 0, "not before the reply leaves"
    pair.worker.next_frame(0.0)
    pair.worker.next_frame(0.0)
    assert pair.worker.receiver.processed == 1


def test_a_gap_is_refused() -> None:
    pair = live_pair()
    flush = pack(m.Flush(1).wire())
    with pytest.raises(RemoteProtocolError, match="where 1 was due"):
        pair.worker.receive(b"".join(encode(2, 0, [flush])), 0.0)


def test_a_frame_that_came_before_is_passed_over() -> None:
    pair = live_pair()
    frame = b"".join(encode(1, 0, [pack(m.Flush(1).wire())]))
    assert len(pair.worker.receive(frame, 0.0)) == 1
    assert pair.worker.receive(frame, 0.0) == []


def test_an_acknowledgement_of_what_was_never_sent_is_refused() -> None:
    pair = live_pair()
    with pytest.raises(RemoteProtocolError, match="was never sent"):
        pair.worker.receive(b"".join(encode(1, 9, [pack(m.Flush(1).wire())])), 0.0)


def test_the_token_before_is_good_until_the_new_one_is_known() -> None:
    pair = live_pair()
    pair.cut()
    pair.connect()
    pair.down.left = 0  # the answer to the resume is lost
    pair.run()
    assert pair.client.state is State.RESUMING
    pair.cut()
    pair.connect()
    pair.run()
    assert pair.client.state is State.LIVE
    old = pair.worker._previous_token
    put_flushes(pair.client, range(1, 2))
    pair.run()
    assert old is not None and not pair.worker.knows(old)


def test_a_wrong_token_resumes_nothing() -> None:
    pair = live_pair()
    pair.cut()
    asked = m.Resume(m.VERSION, pair.worker.id, b"guess", EPOCH, 0)
    with pytest.raises(RemoteProtocolError, match="token"):
        pair.worker.resume(asked, 0.0)
    assert pair.worker.state is State.DETACHED


def test_a_resume_beyond_what_was_sent_is_refused() -> None:
    pair = live_pair()
    pair.cut()
    asked = m.Resume(m.VERSION, pair.worker.id, pair.worker._token, EPOCH, 99)
    with pytest.raises(RemoteProtocolError, match="outside 0 to 0"):
        pair.worker.resume(asked, 0.0)


def test_a_second_connection_takes_over() -> None:
    pair = live_pair()
    asked = m.Resume(m.VERSION, pair.worker.id, pair.worker._token, EPOCH, 0)
    pair.worker.resume(asked, 0.0)
    assert pair.worker.state is State.LIVE


def test_session_lost_ends_the_client() -> None:
    pair = live_pair()
    pair.cut()
    pair.connect()
    assert pair.client.receive(control(m.SessionLost("restarted")), 0.0) == [Lost("restarted")]
    assert pair.client.state is State.GONE


def test_goodbye_and_refusal_end_the_other_side() -> None:
    pair = live_pair()
    pair.client.end("done")
    frame = pair.client.next_frame(0.0)
    assert frame is not None
    assert pair.worker.receive(b"".join(frame), 0.0) == [Ended("done")]
    pair = live_pair()
    pair.worker.refuse("malformed", "no")
    frame = pair.worker.next_frame(0.0)
    assert frame is not None
    assert pair.client.receive(b"".join(frame), 0.0) == [RefusedByPeer("malformed", "no")]


def test_an_idle_side_asks_for_a_sign_of_life_and_silence_is_noticed() -> None:
    pair = live_pair()
    pair.now = limits.HEARTBEAT_SECONDS
    assert pair.client.tick(pair.now) == []
    assert pair.step(), "a ping goes out, and an acknowledgement comes back"
    assert pair.client.next_tick == pytest.approx(2 * limits.HEARTBEAT_SECONDS)
    late = pair.now + limits.SILENCE_SECONDS
    assert pair.client.tick(late) == [Silent(limits.SILENCE_SECONDS)]


def test_a_greeting_is_to_be_answered_sooner_than_silence_is_noticed() -> None:
    client = Session(Role.CLIENT, lambda _: None)
    client.hello(5.0, token=None, ticket=None, client="")
    client.next_frame(5.0)
    assert client.tick(5.0 + limits.HANDSHAKE_SECONDS - 1) == []
    assert client.next_tick == 5.0 + limits.HANDSHAKE_SECONDS
    assert client.tick(client.next_tick) == [Silent(limits.HANDSHAKE_SECONDS)]


def test_cancel_names_the_last_frame_that_was_sent() -> None:
    pair = live_pair()
    put_flushes(pair.client, range(1, 3))
    frame = pair.client.next_frame(0.0)
    assert frame is not None
    pair.worker.receive(b"".join(frame), 0.0)
    pair.client.cancel()
    frame = pair.client.next_frame(0.0)
    assert frame is not None
    assert pair.worker.receive(b"".join(frame), 0.0) == [CancelAsked(1)]


def test_numbered_frames_before_the_handshake_are_refused() -> None:
    client = Session(Role.CLIENT, memory, random=Numbers())
    client.hello(0.0, token=None, ticket=None, client="")
    with pytest.raises(RemoteProtocolError, match="handshake comes first"):
        client.receive(b"".join(encode(1, 0, [pack(m.ValueReply(1, None).wire())])), 0.0)


@pytest.mark.parametrize(
    "message",
    [
        m.Hello(1, None, None, ""),
        m.SessionLost("x"),
        m.Resumed(0, b""),
        m.Welcome(b"", b"", b"", "", {}),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_worker_refuses_what_only_it_may_say(message: m.Message) -> None:
    pair = live_pair()
    with pytest.raises(RemoteProtocolError, match="not expected here"):
        pair.worker.receive(control(message), 0.0)


def test_an_unknown_version_is_refused_with_advice() -> None:
    with pytest.raises(RemoteProtocolError, match="version 1 of the protocol, not 9; install"):
        read_greeting(control(m.Hello(9, None, None, "")))


@pytest.mark.parametrize("message", [m.Ack(), m.Ping(), m.Goodbye("x")])
def test_a_connection_begins_with_a_greeting(message: m.Message) -> None:
    with pytest.raises(RemoteProtocolError, match="begins with hello or resume"):
        read_greeting(control(message))


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("given_input", Input)
def test_moves_outside_the_table_are_errors(role: Role, state: State, given_input: Input) -> None:
    session = Session(role, memory)
    session.state = state
    if (role, state, given_input) in TRANSITIONS:
        session._move(given_input)
        assert session.state is TRANSITIONS[role, state, given_input]
    else:
        with pytest.raises(LocalProtocolError):
            session._move(given_input)


def test_what_lies_behind_a_gate_waits_until_it_opens() -> None:
    pair = live_pair()
    put_flushes(pair.client, range(1, 2))
    gate = pair.client.sender.put_gate()
    put_flushes(pair.client, range(3, 4))
    pair.run()
    assert pair.executed == [1]
    gate.put(m.Flush(2).wire())
    gate.is_open = True
    pair.run()
    assert pair.executed == [1, 2, 3]


def test_a_note_is_kept_for_the_replies_that_come_with_its_acknowledgement() -> None:
    pair = live_pair()
    pair.client.sender.put(m.Flush(1).wire(), note="line 7")
    pair.run()
    assert pair.client.sender.acknowledged == 1
    assert pair.client.sender.note(1, 0) == "line 7"
    assert pair.client.sender.note(1, 1) is None
    put_flushes(pair.client, range(2, 3))
    pair.run()
    assert pair.client.sender.note(1, 0) is None


def test_a_large_tensor_behind_a_mark_or_an_opened_gate_leaves_at_once() -> None:
    pair = live_pair()
    marks: list[int] = []
    pair.client.sender.put_mark(lambda: marks.append(1))
    put_tensor(pair.client, 1, bytes(LARGE))
    assert pair.client.next_frame(0.0) is not None
    assert marks == [1]
    pair = live_pair()
    gate = pair.client.sender.put_gate()
    store = m.Store(1, 0, False, False)
    gate.put_tensor(
        lambda place: store.wire(tensor=place),
        Outgoing("uint8", (LARGE,), memoryview(bytes(LARGE))),
    )
    assert pair.client.next_frame(0.0) is None
    gate.is_open = True
    pair.run()
    assert pair.executed == [1]
