"""Messages: each field accepts what it says and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wsfed.errors import RemoteProtocolError
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Outgoing, decode, encode, pack

VECTORS = Path(__file__).parent.parent / "vectors" / "frames.json"
ALL = (m.CONTROL, m.COMMANDS, m.REPLIES, m.STREAM, m.HUB)
FAILURE = ["RemoteError", "RuntimeError", "no", "torch.add", ["float32[2]"], 0]

#: One of each; the vectors are made of them.
EXAMPLES: list[m.Message] = [
    m.Hello(1, "secret", None, "test"),
    m.Welcome(b"s" * 16, b"t" * 16, b"e" * 16, "bob", {"device": "cpu"}),
    m.Resume(1, b"s" * 16, b"t" * 16, b"e" * 16, 7),
    m.Resumed(7, b"u" * 16),
    m.SessionLost("the worker was restarted"),
    m.Refused("malformed", "a header is an array of four"),
    m.Ack(),
    m.Ping(),
    m.Goodbye("the client is done"),
    m.Cancel(12),
    m.Stop(3),
    m.OpenStream(1, 300_000),
    m.Chunk(1, 262_144, 0),
    m.Store(1, 0, True, False),
    m.Execute("torch.add", [3], [[0, 1], [0, 2]], {"alpha": 2}, 0),
    m.Execute(0, [4], [[0, 3], 1.5, None, True, "mean", [4, 0, None, 2], [6, "float64"]], {}, 1),
    m.Backward([3], None, None, False, None, 0),
    m.Backward([3, 4], [5, None], True, True, [1, 2], 0),
    m.Get(1, 3),
    m.Delete([3, 4]),
    m.Describe(2, 3),
    m.Tag(3, ["#data", "x"], "two rows"),
    m.Search(3, ["#data"]),
    m.Flush(4),
    m.Release([1, 2], [3, 4], [5, 6], 1.0, 0.5),
    m.Seed(-1),
    m.Seed(None),
    m.OpenDataset(5, "digits"),
    m.Batch("digits", ["images", "labels"], [6, 7], 0, 32, 1),
    m.Batch("digits", ["labels"], [6], None, 32, 1),
    m.Move(6, [1], [9], "ws://127.0.0.1:8778", b"k" * 16),
    m.Receive([9], b"k" * 16),
    m.Clone(1, 10),
    m.Define(11, 0),
    m.Run(11, [1, 2], [0.1], [12]),
    m.SecAgg(7, 2, "digits", [11, 12], [1, 2], 0),
    m.RunOver(7, "digits", ["x", "y"], 0, 32, 4, [[11, 8, [0, -1, 1], 1, [0]]], 0, [0], None, None),
    m.TensorReply(1, 0, False),
    m.ValueReply(2, {"shape": [2]}),
    m.RequestFailed(3, 5, 0, FAILURE),
    m.Failed(5, 0, True, FAILURE),
    m.Progress(7, 2, [[0.5], [0.25]]),
    m.Enrol(1, "secret", "phone-7", b"k" * 16, "portable", ["digits"], ["mm@1", "conv@1"]),
    m.Enrolled(),
    m.Ring(b"t" * 32),
    m.Answer(1, b"t" * 32),
    m.Call(1, None, "phone-7"),
    m.Through(),
    m.Watch(1, "secret"),
    m.Joined("phone-7", "portable", ["digits"], ["mm@1", "conv@1"], 1_700_000_000),
    m.Present(),
    m.Left("phone-7", "its connection broke"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_from_its_wire_form(message: m.Message) -> None:
    assert m.parse(message.wire(), ALL) == message


def test_there_is_an_example_of_every_message() -> None:
    assert {type(example) for example in EXAMPLES} == set(m.BY_CODE.values())


def vector_of(message: m.Message) -> dict[str, Any]:
    tensors = [Outgoing("float32", (2,), memoryview(b"\x00\x00\x80?\x00\x00\x00@"))]
    carries = any(name == "tensor" for name, _ in message.checks)
    seq = 0 if message.kind in (m.CONTROL, m.HUB) else 3
    frame = encode(seq, 2, [pack(message.wire())], tensors if carries else ())
    return {"message": type(message).__name__, "kind": message.kind, "frame": b"".join(frame).hex()}


def test_the_golden_vectors_are_what_is_encoded_today() -> None:
    assert json.loads(VECTORS.read_text()) == [vector_of(example) for example in EXAMPLES]


def test_the_golden_vectors_decode_to_the_examples() -> None:
    for vector, example in zip(json.loads(VECTORS.read_text()), EXAMPLES, strict=True):
        frame = decode(bytes.fromhex(vector["frame"]))
        assert m.parse(frame.messages[0], (vector["kind"],)) == example


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ([], "begins with its code"),
        (7, "begins with its code"),
        (["32", 1], "begins with its code"),
        ([True], "begins with its code"),
        ([999], "no message 999"),
        ([32, 1, 0], "Store has 4 fields, and 2 came"),
        ([32, 1, 0, True, False, 5], "Store has 4 fields, and 5 came"),
        ([32, 0, 0, True, False], "Store.id has to be a positive integer"),
        ([32, True, 0, True, False], "Store.id has to be"),
        ([32, 2**60, 0, True, False], "Store.id has to be"),
        ([32, 1, -1, True, False], "Store.tensor has to be"),
        ([32, 1, 0, 1, False], "Store.requires_grad has to be true or false"),
        ([33, None, [], [], {}, 0], "Execute.op has to be"),
        ([33, "x" * 257, [], [], {}, 0], "Execute.op has to be"),
        ([33, "torch.add", [0], [], {}, 0], "Execute.outs has to be"),
        ([33, "torch.add", 5, [], {}, 0], "Execute.outs has to be"),
        ([33, "torch.add", [1], {}, {}, 0], "Execute.args has to be"),
        ([33, "torch.add", [1], [], [], 0], "Execute.kwargs has to be"),
        ([33, "torch.add", [1], [], {}, -1], "Execute.mode has to be"),
        ([34, [1], [0], None, False, None, 0], "Backward.gradients has to be"),
        ([36, list(range(1, 20_000))], "Delete.ids has to be"),
        ([38, 1, ["x"] * 33, ""], "Tag.tags has to be"),
        ([38, 1, ["x" * 5000], ""], "Tag.tags has to be"),
        ([41, 2**64], "Seed.seed has to be"),
        ([43, "d", ["x"], [1], None, 0, 0], "Batch.batch_size has to be"),
        ([67, 1, 0, True, ["a", "b"]], "Failed.failure has to be"),
        ([96, 1, None, "", b"", "torch", [], []], "Enrol.node has to be a name"),
        ([96, 1, None, " bob", b"", "torch", [], []], "Enrol.node has to be a name"),
        ([96, 1, None, "bob\n", b"", "torch", [], []], "Enrol.node has to be a name"),
        ([96, 1, None, "b" * 129, b"", "torch", [], []], "Enrol.node has to be a name"),
        ([96, 1, None, "bob", b"", "torch", ["x"] * 33, []], "Enrol.tags has to be"),
        ([96, 1, None, "bob", b"", "torch", [], ["\x1b[2J"]], "Enrol.capabilities has to be"),
    ],
)
def test_a_wrong_message_is_refused_with_its_name_and_field(raw: Any, says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        m.parse(raw, ALL)


def test_a_message_of_the_wrong_direction_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="ValueReply is not expected here"):
        m.parse(m.ValueReply(1, None).wire(), (m.COMMANDS,))
