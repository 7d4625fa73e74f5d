"""Everything that can be said on the wire: one frozen dataclass a message.

On the wire a message is the array ``[code, field, field, ...]`` in the order of the class. Each
field states what it accepts; :func:`parse` refuses everything else with the name of the message
and of the field. Tensors are not in messages: a message holds an index into the tensor table of
its frame (:mod:`wsfed.protocol.codec`).

*Control* messages manage the connection and stand outside the numbered stream; *commands* go from
client to worker and *replies* from worker to client, both numbered, ordered and delivered exactly
once. *Hub* messages, outside of it as well, are between a hub and the nodes and clients that dial
it, until it has connected two of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar, cast, dataclass_transform

from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits

__all__ = [
    "BY_CODE",
    "COMMANDS",
    "CONTROL",
    "HUB",
    "REPLIES",
    "STREAM",
    "Ack",
    "Answer",
    "Backward",
    "Batch",
    "Call",
    "Cancel",
    "Chunk",
    "Clone",
    "Define",
    "Delete",
    "Describe",
    "Enrol",
    "Enrolled",
    "Execute",
    "Failed",
    "Flush",
    "Get",
    "Goodbye",
    "Hello",
    "Joined",
    "Left",
    "Message",
    "Move",
    "OpenDataset",
    "OpenStream",
    "Ping",
    "Present",
    "Progress",
    "Receive",
    "Refused",
    "RequestFailed",
    "Resume",
    "Resumed",
    "Ring",
    "Run",
    "RunOver",
    "Search",
    "SecAgg",
    "Seed",
    "SessionLost",
    "Stop",
    "Store",
    "Tag",
    "TensorReply",
    "Through",
    "ValueReply",
    "Watch",
    "Welcome",
    "parse",
]

VERSION: Final = 1

CONTROL: Final = "control"
COMMANDS: Final = "command"
REPLIES: Final = "reply"
STREAM: Final = "stream"  # a numbered message of either direction
HUB: Final = "hub"


class Message:
    """The base of all messages; a class a line in the table of the documentation."""

    __slots__ = ()
    code: ClassVar[int]
    kind: ClassVar[str]
    checks: ClassVar[tuple[tuple[str, Check], ...]]

    def wire(self, **changes: Any) -> list[Any]:
        """The message as msgpack sees it, with some fields changed."""
        if not changes:
            return [self.code, *[getattr(self, name) for name, _ in self.checks]]
        given = [changes.get(name, getattr(self, name)) for name, _ in self.checks]
        return [self.code, *given]


@dataclass(frozen=True, slots=True)
class Check:
    """What a field accepts: a description for people and a test."""

    says: str
    accepts: Callable[[Any], bool]


# --- what a field can be -------------------------------------------------------------------------


def _is_uint(value: Any) -> bool:
    return type(value) is int and 0 <= value <= limits.MAX_ID


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 < value <= limits.MAX_ID


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= limits.MAX_TEXT


def _is_bytes(value: Any) -> bool:
    return type(value) is bytes and len(value) <= 64


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _list_of(test: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= most and all(map(test, value))

    return accepts


def _maybe(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _field(says: str, accepts: Callable[[Any], bool]) -> Any:
    return field(metadata={"check": Check(says, accepts)})


def _uint() -> Any:
    return _field("an unsigned integer below 2^53", _is_uint)


def _id() -> Any:
    return _field("a positive integer below 2^53", _is_id)


def _ids() -> Any:
    return _field("a list of identifiers", _list_of(_is_id, limits.MAX_IDS))


def _text() -> Any:
    return _field(f"text of at most {limits.MAX_TEXT} characters", _is_text)


def _bytes() -> Any:
    return _field("at most 64 bytes", _is_bytes)


def _flag() -> Any:
    return _field("true or false", _is_flag)


def _texts(most: int) -> Any:
    return _field(f"a list of at most {most} texts", _list_of(_is_text, most))


def _is_failure(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 6
        and all(map(_is_text, value[:4]))
        and _list_of(_is_text, 256)(value[4])
        and _is_uint(value[5])
    )


#: A failure on the wire: ``[class, type, message, op, shapes, step of a plan or 0]``.
def _failure() -> Any:
    return _field("a failure: [class, type, message, op, [shapes], step]", _is_failure)


def _mapping() -> Any:
    return _field("a map with text keys", lambda value: type(value) is dict)


def _is_name(value: Any) -> bool:
    """What people read, and write on a command line: no blanks around it, no line breaks."""
    return (
        type(value) is str
        and 0 < len(value) <= limits.MAX_NAME
        and value.isprintable()
        and value == value.strip()
    )


def _name() -> Any:
    return _field(
        f"a name of at most {limits.MAX_NAME} printable characters, without blanks around it",
        _is_name,
    )


def _names(most: int) -> Any:
    return _field(f"a list of at most {most} names", _list_of(_is_name, most))


_M = TypeVar("_M", bound=Message)


@dataclass_transform(
    frozen_default=True,
    field_specifiers=(
        _field,
        _uint,
        _id,
        _ids,
        _text,
        _bytes,
        _flag,
        _texts,
        _mapping,
        _failure,
        _name,
        _names,
    ),
)
def _message(code: int, kind: str) -> Callable[[type[_M]], type[_M]]:
    def register(cls: type[_M]) -> type[_M]:
        made = dataclass(frozen=True, slots=True)(cls)
        made.code, made.kind = code, kind
        made.checks = tuple(
            (item.name, cast(Check, item.metadata["check"]))
            for item in dataclasses.fields(made)  # type: ignore[arg-type]
        )
        return made

    return register


# --- control: outside the numbered stream --------------------------------------------------------


@_message(1, CONTROL)
class Hello(Message):
    """The first message of a new session."""

    version: int = _uint()
    token: str | None = _field("text or nothing", _maybe(_is_text))
    #: Set by a worker that brings a tensor: the number under which it is expected.
    ticket: bytes | None = _field("at most 64 bytes or nothing", _maybe(_is_bytes))
    client: str = _text()


@_message(2, CONTROL)
class Welcome(Message):
    """The session exists. ``info`` tells what the worker is."""

    session: bytes = _bytes()
    token: bytes = _bytes()
    epoch: bytes = _bytes()
    worker: str = _text()
    info: dict[str, Any] = _mapping()


@_message(3, CONTROL)
class Resume(Message):
    """The first message of a new connection for a session that exists."""

    version: int = _uint()
    session: bytes = _bytes()
    token: bytes = _bytes()
    epoch: bytes = _bytes()
    received: int = _uint()


@_message(4, CONTROL)
class Resumed(Message):
    """The session goes on; ``token`` is for the next resume."""

    received: int = _uint()
    token: bytes = _bytes()


@_message(5, CONTROL)
class SessionLost(Message):
    """There is no such session any more."""

    reason: str = _text()


@_message(6, CONTROL)
class Refused(Message):
    """The sender ends the connection because of what the peer did."""

    error: str = _text()
    reason: str = _text()


@_message(7, CONTROL)
class Ack(Message):
    """Nothing but the acknowledgement that every frame carries."""


@_message(8, CONTROL)
class Ping(Message):
    """Asks for an :class:`Ack`, as a sign of life."""


@_message(9, CONTROL)
class Goodbye(Message):
    """The session ends here; nothing is kept."""

    reason: str = _text()


@_message(10, CONTROL)
class Cancel(Message):
    """Skip every command up to frame ``seq`` that has not started."""

    seq: int = _uint()


@_message(11, CONTROL)
class Stop(Message):
    """End a run over a data set (its request) after the batch that is being worked on."""

    request: int = _id()


# --- stream: numbered, either direction ----------------------------------------------------------


@_message(16, STREAM)
class OpenStream(Message):
    """Announces a large tensor: so many bytes will follow in chunks."""

    stream: int = _id()
    nbytes: int = _uint()


@_message(17, STREAM)
class Chunk(Message):
    """The next piece of a stream; ``tensor`` is its place in the frame's tensor table."""

    stream: int = _id()
    offset: int = _uint()
    tensor: int = _uint()


# --- commands: client to worker ------------------------------------------------------------------


@_message(32, COMMANDS)
class Store(Message):
    """Keep a tensor under ``id``; a worker that lets nothing leave but releases keeps a copy of a
    sealed one, which stays as it came.
    """

    id: int = _id()
    tensor: int = _uint()
    requires_grad: bool = _flag()
    sealed: bool = _flag()


def _is_op(value: Any) -> bool:
    return _is_uint(value) or (type(value) is str and len(value) <= 256)


@_message(33, COMMANDS)
class Execute(Message):
    """Run one operation. ``op`` is its name, or the number the name got at its first use."""

    op: str | int = _field("the name of an operation or its number", _is_op)
    #: An identifier for each tensor of the result, in order; a known one is bound anew.
    outs: list[int] = _ids()
    args: list[Any] = _field("a list", lambda value: type(value) is list)
    kwargs: dict[str, Any] = _mapping()
    mode: int = _uint()


_is_maybe_ids = _maybe(_list_of(_is_id, limits.MAX_IDS))


@_message(34, COMMANDS)
class Backward(Message):
    """Gradients of ``roots`` into the leaves of their graph."""

    roots: list[int] = _ids()
    gradients: list[int | None] | None = _field(
        "nothing or a list of identifiers or nothings",
        _maybe(_list_of(_maybe(_is_id), limits.MAX_IDS)),
    )
    retain_graph: bool | None = _field("true, false or nothing", _maybe(_is_flag))
    create_graph: bool = _flag()
    inputs: list[int] | None = _field("nothing or a list of identifiers", _is_maybe_ids)
    mode: int = _uint()


@_message(35, COMMANDS)
class Get(Message):
    """Send the value of ``id`` back."""

    request: int = _id()
    id: int = _id()


@_message(36, COMMANDS)
class Delete(Message):
    """Forget these objects. Unknown ones are passed over."""

    ids: list[int] = _ids()


@_message(37, COMMANDS)
class Describe(Message):
    """Tell shape, dtype and tags of ``id``; never its values."""

    request: int = _id()
    id: int = _id()


@_message(38, COMMANDS)
class Tag(Message):
    """Add tags and a description to an object, so that a search finds it."""

    id: int = _id()
    tags: list[str] = _texts(limits.MAX_TAGS)
    description: str = _text()


@_message(39, COMMANDS)
class Search(Message):
    """List the objects of this session and the open names of the worker that have all tags."""

    request: int = _id()
    tags: list[str] = _texts(limits.MAX_TAGS)


@_message(40, COMMANDS)
class Flush(Message):
    """A barrier: the reply says that everything before it has run."""

    request: int = _id()


def _is_seed(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**64


@_message(41, COMMANDS)
class Seed(Message):
    """Seed the random numbers of this session, as ``torch.manual_seed`` does locally; with nothing
    as ``torch.seed``: from the machine's entropy.
    """

    seed: int | None = _field("nothing or an integer of 64 bits", _maybe(_is_seed))


@_message(42, COMMANDS)
class OpenDataset(Message):
    """Tell fields, rows, shapes and dtypes of a data set of the owner's."""

    request: int = _id()
    name: str = _text()


@_message(43, COMMANDS)
class Batch(Message):
    """Make one batch of some fields of a data set: an identifier for each."""

    name: str = _text()
    fields: list[str] = _texts(limits.MAX_IDS)
    outs: list[int] = _ids()
    #: Order of the rows: nothing for the natural one, else the seed of a permutation.
    seed: int | None = _field("nothing or an integer of 53 bits", _maybe(_is_uint))
    batch_size: int = _id()
    index: int = _uint()


@_message(44, COMMANDS)
class Move(Message):
    """Take these objects to another worker, which expects them under ``ticket``."""

    request: int = _id()
    ids: list[int] = _ids()
    #: What the objects are to be called there, one identifier each.
    names: list[int] = _ids()
    url: str = _text()
    ticket: bytes = _bytes()


@_message(45, COMMANDS)
class Receive(Message):
    """Another worker will bring these objects; it knows ``ticket``."""

    ids: list[int] = _ids()
    ticket: bytes = _bytes()


@_message(46, COMMANDS)
class Clone(Message):
    """Bind ``copy`` to an independent copy of ``id``, a leaf with the same ``requires_grad``."""

    id: int = _id()
    copy: int = _id()


@_message(47, COMMANDS)
class Define(Message):
    """Keep a recorded program (:mod:`wsfed.plans.program`), the bytes of a tensor, as ``plan``."""

    plan: int = _id()
    tensor: int = _uint()


def _is_number(value: Any) -> bool:
    return type(value) is float


_are_numbers = _list_of(_is_number, limits.MAX_IDS)


@_message(48, COMMANDS)
class Run(Message):
    """Run a program once. ``inputs`` and ``outs`` are in its own order, and so are ``numbers``."""

    plan: int = _id()
    inputs: list[int] = _ids()
    numbers: list[float] = _field("a list of fractional numbers", _are_numbers)
    outs: list[int] = _ids()


@_message(50, COMMANDS)
class SecAgg(Message):
    """Take one step of secure aggregation (:mod:`wsfed.privacy.secagg`); answered by a tensor.

    Step 0 begins a round: ``given`` is the model whose hash is bound into every key. Step 3 is
    answered by the masked change from ``given`` to ``values`` (``values`` themselves, where
    ``given`` is empty) and the number of rows; the other steps by bytes.
    """

    request: int = _id()
    step: int = _field("0 to 5", lambda value: type(value) is int and 0 <= value <= 5)
    #: The data set whose rows count as the weight.
    name: str = _text()
    values: list[int] = _ids()
    given: list[int] = _ids()
    #: The place of what the collector says, the bytes of a tensor.
    tensor: int = _uint()


@_message(51, COMMANDS)
class Release(Message):
    """Make of trained values what the owner lets leave, and keep it under ``outs``.

    ``given`` plus the change to ``values``, brought to an L2 norm of ``clip``, plus Gaussian noise
    of ``noise * clip``.
    """

    values: list[int] = _ids()
    given: list[int] = _ids()
    outs: list[int] = _ids()
    clip: float = _field("a number", _is_number)
    noise: float = _field("a number", _is_number)


def _is_segment(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 5
        and _is_id(value[0])
        and _is_id(value[1])
        and _list_of(_is_place, limits.MAX_IDS)(value[2])
        and value[3] in (1, value[1])
        and _list_of(_is_uint, limits.MAX_IDS)(value[4])
    )


def _is_place(value: Any) -> bool:
    return type(value) is int and -limits.MAX_IDS <= value <= limits.MAX_ID


def _is_rate(value: Any) -> bool:
    return type(value) is float and 0.0 < value <= 1.0


@_message(49, COMMANDS)
class RunOver(Message):
    """Run programs over the batches of a data set, and report the numbers that they give."""

    request: int = _id()
    name: str = _text()
    fields: list[str] = _texts(limits.MAX_IDS)
    #: Order of the rows: nothing for the natural one, else the seed of the first epoch's
    #: permutation; the next epoch has the next seed.
    seed: int | None = _field("nothing or an integer of 53 bits", _maybe(_is_uint))
    batch_size: int = _id()
    #: How many batches an epoch has.
    batches: int = _id()
    #: For so many batches, one after the other: ``[plan, count, inputs, rows, outs]``. An input
    #: that is 0 or less is a field of the batch (-1 the second one); rows are lists of numbers,
    #: one a batch or one for all; an identifier of 0 is not bound.
    segments: list[Any] = _field(
        "a list of [plan, count, inputs, rows, outs]", _list_of(_is_segment, limits.MAX_IDS)
    )
    #: The place of a float64 tensor: the numbers of all rows, one after the other.
    tensor: int = _uint()
    #: Which results are reported after each batch.
    shown: list[int] = _field("a list of places", _list_of(_is_uint, limits.MAX_IDS))
    #: The place of the result that ends it when it is true.
    until: int | None = _field("nothing or a place", _maybe(_is_uint))
    #: Poisson sampling: each row is taken with this probability, drawn from the machine's entropy.
    #: ``batch_size`` rows are given in any case, and one field more: 1.0 for a row that was taken,
    #: 0.0 for one that only fills up.
    rate: float | None = _field("nothing or a number between 0 and 1", _maybe(_is_rate))


# --- replies: worker to client -------------------------------------------------------------------


@_message(64, REPLIES)
class TensorReply(Message):
    """The value asked for by :class:`Get`."""

    request: int = _id()
    tensor: int = _uint()
    requires_grad: bool = _flag()


@_message(65, REPLIES)
class ValueReply(Message):
    """The answer to any other request: plain data."""

    request: int = _id()
    value: Any = _field("plain data", lambda _: True)


@_message(66, REPLIES)
class RequestFailed(Message):
    """The request has no answer. ``seq`` and ``index`` name the command that failed first."""

    request: int = _id()
    seq: int = _uint()
    index: int = _uint()
    failure: list[Any] = _failure()


@_message(67, REPLIES)
class Failed(Message):
    """A command that has no reply failed; its results are poisoned."""

    seq: int = _uint()
    index: int = _uint()
    #: Whether the failure has poisoned an object, so that awaiting that object will tell.
    bound: bool = _flag()
    failure: list[Any] = _failure()


@_message(68, REPLIES)
class Progress(Message):
    """How far a :class:`RunOver` is: batches done, and what was not reported before."""

    request: int = _id()
    done: int = _uint()
    #: A list for each batch.
    values: list[list[float]] = _field(
        "a list of lists of fractional numbers", _list_of(_are_numbers, limits.MAX_IDS)
    )


# --- hub: between a hub and those that dial it ----------------------------------------------------


@_message(96, HUB)
class Enrol(Message):
    """A node's first message on the connection that it keeps: who it is, and what it offers."""

    version: int = _uint()
    token: str | None = _field("text or nothing", _maybe(_is_text))
    node: str = _name()
    #: Random, of this process; whoever shows it again is the same node, and takes over.
    key: bytes = _bytes()
    #: What it runs: ``"torch"`` or ``"portable"``.
    profile: str = _name()
    tags: list[str] = _names(limits.MAX_TAGS)
    capabilities: list[str] = _names(limits.MAX_CAPABILITIES)


@_message(97, HUB)
class Enrolled(Message):
    """The hub knows the node now."""


@_message(98, HUB)
class Ring(Message):
    """A client wants a session: the node dials once more, and shows this ticket there."""

    ticket: bytes = _bytes()


@_message(99, HUB)
class Answer(Message):
    """A node's first message on a connection that it was asked for."""

    version: int = _uint()
    ticket: bytes = _bytes()


@_message(100, HUB)
class Call(Message):
    """A client's first message: it wants to be connected to a node."""

    version: int = _uint()
    token: str | None = _field("text or nothing", _maybe(_is_text))
    node: str = _name()


@_message(101, HUB)
class Through(Message):
    """Both sides are there: what follows is theirs, and the hub does not read it."""


@_message(102, HUB)
class Watch(Message):
    """A client's first message: it wants to be told who is there, comes and goes."""

    version: int = _uint()
    token: str | None = _field("text or nothing", _maybe(_is_text))


@_message(103, HUB)
class Joined(Message):
    """A node is there."""

    node: str = _name()
    profile: str = _name()
    tags: list[str] = _names(limits.MAX_TAGS)
    capabilities: list[str] = _names(limits.MAX_CAPABILITIES)
    #: Seconds since 1970.
    since: int = _uint()


@_message(104, HUB)
class Present(Message):
    """All nodes that were there when the client came have been told."""


@_message(105, HUB)
class Left(Message):
    """A node is gone."""

    node: str = _name()
    reason: str = _text()


BY_CODE: Final[Mapping[int, type[Message]]] = MappingProxyType(
    {
        cls.code: cls
        for cls in sorted(
            (item for item in list(globals().values()) if isinstance(item, type)),
            key=lambda cls: getattr(cls, "code", 0),
        )
        if issubclass(cls, Message) and cls is not Message
    }
)


def _is_ordinary(code: int, op: Any, outs: Any, args: Any, kwargs: Any, mode: Any) -> bool:
    """Whether this is an operation as most messages are: numbered, of few results, no mistakes."""
    return (
        type(op) is int
        and 0 <= op <= limits.MAX_ID
        and type(outs) is list
        and (not outs or (len(outs) == 1 and _is_id(outs[0])))
        and type(args) is list
        and type(kwargs) is dict
        and type(mode) is int
        and 0 <= mode <= limits.MAX_ID
    )


def parse(raw: Any, kinds: Sequence[str]) -> Message:
    """Make a message of what msgpack unpacked.

    Raises:
        RemoteProtocolError: unknown message, wrong direction, missing or wrongly typed field.
    """
    if type(raw) is not list or not raw or type(raw[0]) is not int:
        raise RemoteProtocolError("malformed", "a message is an array that begins with its code")
    is_short = raw[0] == Execute.code and len(raw) == 6 and COMMANDS in kinds
    if is_short and _is_ordinary(*raw):
        return Execute(*raw[1:])
    cls = BY_CODE.get(raw[0])
    if cls is None:
        raise RemoteProtocolError("unknown-message", f"there is no message {raw[0]}")
    if cls.kind not in kinds:
        raise RemoteProtocolError("unexpected", f"{cls.__name__} is not expected here")
    checks = cls.checks
    if len(raw) != len(checks) + 1:
        raise RemoteProtocolError(
            "malformed", f"{cls.__name__} has {len(checks)} fields, and {len(raw) - 1} came"
        )
    for (name, check), value in zip(checks, raw[1:], strict=True):
        if not check.accepts(value):
            raise RemoteProtocolError("malformed", f"{cls.__name__}.{name} has to be {check.says}")
    return cls(*raw[1:])
