"""The worker's decisions: events in, instructions out, and the same again from a log."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import decode, encode, pack
from wsfed.protocol.session import Role, Session, State
from wsfed.tensors import allocate, outgoing
from wsfed.worker.interpreter import Interpreter, Outcome, Reply
from wsfed.worker.session import (
    Arrived,
    CancelUpTo,
    Carried,
    Close,
    Done,
    Event,
    Expect,
    Instruction,
    PeerLost,
    Run,
    Tick,
    WorkerSession,
)


class Worker:
    """A session with an interpreter that runs at once."""

    def __init__(self, log: list[tuple[float, Event]] | None = None) -> None:
        protocol = Session(Role.WORKER, allocate, random=bytes)
        protocol.welcome(0.0, epoch=b"e" * 16, worker="bob", info={})
        note = None if log is None else lambda now, event: log.append((now, event))
        self.session = WorkerSession(protocol, log=note)
        self.interpreter = Interpreter(torch.device("cpu"), {}, max_bytes=2**30, max_objects=1000)
        self.instructions: list[str] = []

    def handle(self, event: Event, now: float = 0.0) -> list[Instruction]:
        made = self.session.handle(event, now)
        self.instructions += [type(each).__name__ for each in made]
        return made

    def perform(self, made: list[Instruction]) -> list[Instruction]:
        """Run what is to be run, until nothing is."""
        others = []
        while made:
            instruction = made.pop(0)
            if isinstance(instruction, Run):
                outcome = self.interpreter.run(
                    instruction.seq,
                    instruction.commands,
                    instruction.tensors,
                    instruction.start,
                    instruction.budget,
                )
                made += self.handle(Done(outcome))
            else:
                others.append(instruction)
        return others

    def replies(self) -> list[m.Message]:
        found = []
        while (frame := self.session.protocol.next_frame(0.0)) is not None:
            kinds = (m.CONTROL, m.REPLIES, m.STREAM)
            found += [m.parse(raw, kinds) for raw in decode(b"".join(frame)).messages]
        return found


def frame(seq: int, *commands: m.Message, tensors: Any = ()) -> bytes:
    return b"".join(encode(seq, 0, [pack(each.wire()) for each in commands], tensors))


STORE = frame(1, m.Store(1, 0, False, False), tensors=[outgoing(torch.arange(3))])
DOUBLE = frame(2, m.Execute("torch.Tensor.mul", [2], [[0, 1], 2], {}, 0), m.Get(5, 2))


def test_a_frame_is_run_and_its_replies_wait_to_be_sent() -> None:
    worker = Worker()
    worker.perform(worker.handle(Arrived(STORE)))
    worker.perform(worker.handle(Arrived(DOUBLE)))
    assert any(isinstance(reply, m.TensorReply) for reply in worker.replies())
    assert worker.session.protocol.receiver.processed == 2


def test_one_frame_is_run_at_a_time() -> None:
    worker = Worker()
    (run,) = worker.handle(Arrived(STORE))
    assert isinstance(run, Run)
    assert worker.handle(Arrived(DOUBLE)) == []
    (then,) = worker.handle(Done(Outcome(1)))
    assert isinstance(then, Run)
    assert then.seq == 2


def test_a_frame_that_was_stopped_by_its_replies_goes_on_when_they_are_read() -> None:
    worker = Worker()
    large = outgoing(torch.zeros(limits.REPLY_BACKLOG_BYTES // 4 + 1000))
    (run,) = worker.handle(Arrived(frame(1, m.Get(1, 1), m.Get(2, 1))))
    assert isinstance(run, Run)
    half = Outcome(1, [Reply(m.TensorReply(1, 0, False), large)])
    assert worker.handle(Done(half)) == [], "the client has a window of replies to read"
    sender = worker.session.protocol.sender
    made: list[Instruction] = []
    while not sender.idle and not made:
        worker.replies()
        read = b"".join(encode(0, sender.sent, [pack(m.Ack().wire())]))
        made = worker.handle(Arrived(read))
    (again,) = made
    assert isinstance(again, Run)
    assert (again.seq, again.start) == (1, 1)


def test_losing_the_peer_stops_nothing_until_the_time_to_live_is_over() -> None:
    worker = Worker()
    (run,) = worker.handle(Arrived(STORE))
    worker.handle(PeerLost(), 5.0)
    assert worker.session.protocol.state is State.DETACHED
    worker.perform([run])
    assert 1 in worker.interpreter.store
    assert worker.handle(Tick(), 5.0 + limits.SESSION_TTL_SECONDS - 1) == []
    (close,) = worker.handle(Tick(), 5.0 + limits.SESSION_TTL_SECONDS)
    assert isinstance(close, Close)
    assert close.forget


def test_a_peer_that_breaks_the_rules_is_closed_and_what_runs_is_forgotten() -> None:
    worker = Worker()
    worker.handle(Arrived(STORE))
    (close,) = worker.handle(Arrived(frame(9, m.Flush(1))))
    assert close == Close("frame 9 came where 2 was due", forget=True)
    assert worker.handle(Done(Outcome(1))) == []
    assert isinstance(worker.replies()[-1], m.Refused)


def test_silence_closes_the_connection_and_keeps_the_session() -> None:
    worker = Worker()
    (close,) = worker.handle(Tick(), limits.SILENCE_SECONDS)
    assert isinstance(close, Close)
    assert not close.forget


def test_cancel_expect_and_goodbye_become_instructions() -> None:
    worker = Worker()
    cancel = b"".join(encode(0, 0, [pack(m.Cancel(3).wire())]))
    assert worker.handle(Arrived(cancel)) == [CancelUpTo(3)]
    expect = worker.perform(worker.handle(Arrived(frame(1, m.Receive([4], b"t")))))
    assert expect == [Expect(b"t", [4])]
    goodbye = b"".join(encode(0, 0, [pack(m.Goodbye("done").wire())]))
    assert worker.handle(Arrived(goodbye)) == [Close("done", forget=True)]


def test_a_move_is_carried_and_answered_with_its_end() -> None:
    for error, kind in ((None, m.ValueReply), (ConnectionError("gone"), m.RequestFailed)):
        worker = Worker()
        worker.perform(worker.handle(Arrived(STORE)))
        move = frame(2, m.Move(7, [1], [9], "ws://elsewhere", b"t"))
        (carry,) = worker.perform(worker.handle(Arrived(move)))
        worker.handle(Carried(carry, error))  # type: ignore[arg-type]
        assert isinstance(worker.replies()[-1], kind)


def test_a_carrier_may_store_what_is_expected_and_nothing_else() -> None:
    for commands, allowed in (
        ((m.Store(4, 0, False, False),), True),
        ((m.Store(5, 0, False, False),), False),
        ((m.Get(1, 4),), False),
        ((m.Execute("torch.abs", [4], [[0, 4]], {}, 0),), False),
    ):
        protocol = Session(Role.WORKER, allocate)
        protocol.welcome(0.0, epoch=b"e" * 16, worker="bob", info={})
        session = WorkerSession(protocol, only=frozenset({4}))
        data = frame(1, *commands, tensors=[outgoing(torch.ones(1))])
        (made,) = session.handle(Arrived(data), 0.0)
        assert isinstance(made, Run) is allowed


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, frame(1, m.ValueReply(1, None))])
def test_what_is_no_frame_of_a_client_closes_the_session(data: bytes) -> None:
    (close,) = Worker().handle(Arrived(data))
    assert isinstance(close, Close)
    assert close.forget


def test_a_log_played_again_makes_the_same_instructions_and_replies() -> None:
    log: list[tuple[float, Event]] = []
    first = Worker(log)
    first.perform(first.handle(Arrived(STORE)))
    first.perform(first.handle(Arrived(DOUBLE), 1.0))
    first.perform(first.handle(Arrived(frame(3, m.Get(6, 99))), 2.0))
    first.handle(PeerLost(), 3.0)
    kinds = [type(event) for _, event in log]
    assert kinds == [Arrived, Done, Arrived, Done, Arrived, Done, PeerLost]
    second = Worker()
    # The log is of any length; that something is in it was asserted above.
    for now, event in log:
        second.handle(event, now)
    assert second.instructions == first.instructions
    assert second.session.protocol.sender.backlog == first.session.protocol.sender.backlog
