"""What is said to a hub and by it, on either side of a wire, until it connects two of them.

A node keeps a line to its hub; a client keeps one to be told who is there, and opens one for each
session. Both dial, so both ask whether the hub lives, and the hub answers.
"""

from __future__ import annotations

import asyncio
import ssl as ssl_module
from typing import Final

from wsfed.errors import AuthenticationFailed, RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol import messages as m
from wsfed.protocol.codec import decode, encode, pack
from wsfed.transport.websocket import dial
from wsfed.transport.wire import Wire, WireLost

__all__ = ["Line", "answer", "call", "open_line"]

_KINDS: Final = (m.CONTROL, m.HUB)
#: What a dialling side waits for beyond the time that the hub gives a node to dial back.
_MARGIN_SECONDS: Final = 5.0


class Line:
    """One end of a conversation with a hub.

    Args:
        wire: what carries it; the line's owner closes it.
        asks: whether this end asks for signs of life, as the one that has dialled does.
    """

    def __init__(self, wire: Wire, *, asks: bool) -> None:
        self.wire, self._asks = wire, asks
        #: Set when the other side has said anything; cleared by whoever waits for that.
        self.heard = asyncio.Event()

    async def say(self, message: m.Message) -> None:
        """Send a message.

        Raises:
            WireLost: the other side is gone, or does not read.
        """
        try:
            async with asyncio.timeout(limits.SILENCE_SECONDS):
                await self.wire.send([b"".join(encode(0, 0, [pack(message.wire())]))])
        except TimeoutError:
            raise WireLost("the other side does not read") from None

    async def hear(self) -> m.Message:
        """The next message that is no sign of life.

        Raises:
            WireLost: the other side is gone, or silent.
            RemoteProtocolError: it sent what is no message.
        """
        loop = asyncio.get_running_loop()
        heard_at = loop.time()
        while True:
            try:
                async with asyncio.timeout(self._patience):
                    message = _read(await self.wire.receive())
            except TimeoutError:
                silent = loop.time() - heard_at
                if not self._asks or silent >= limits.SILENCE_SECONDS:
                    raise WireLost(f"nothing came for {silent:.0f} s") from None
                await self.say(m.Ping())
                continue
            heard_at = loop.time()
            self.heard.set()
            if isinstance(message, m.Ping):
                await self.say(m.Ack())
            elif not isinstance(message, m.Ack):
                return message

    @property
    def _patience(self) -> float:
        return limits.HEARTBEAT_SECONDS if self._asks else limits.SILENCE_SECONDS

    async def greeted(self, seconds: float) -> m.Message:
        """The first message, or the answer to one.

        Raises:
            WireLost: nothing came in so many seconds, or the other side is gone.
            RemoteProtocolError: it sent what is no message.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self.hear()
        except TimeoutError:
            raise WireLost(f"no answer within {seconds:g} s") from None

    async def refuse(self, code: str, reason: str) -> None:
        """Say why not, and close."""
        try:
            await self.say(m.Refused(code, reason[: limits.MAX_TEXT]))
        except WireLost:
            pass
        await self.wire.close(reason)


def _read(data: bytes | bytearray | memoryview) -> m.Message:
    if len(data) > limits.MAX_HUB_BYTES:
        raise RemoteProtocolError(
            "message-size", f"a message to a hub has at most {limits.MAX_HUB_BYTES:,} bytes"
        )
    frame = decode(data)
    if frame.seq or frame.tensors or len(frame.messages) != 1:
        raise RemoteProtocolError("unexpected", "a hub is told one message at a time")
    return m.parse(frame.messages[0], _KINDS)


# --- those that dial ------------------------------------------------------------------------------


async def open_line(
    url: str,
    greeting: m.Message,
    expected: tuple[type[m.Message], ...],
    *,
    ssl: ssl_module.SSLContext | None = None,
    timeout: float = 10.0,
    patience: float = limits.HANDSHAKE_SECONDS,
) -> tuple[Line, m.Message]:
    """Dial a hub and greet it; gives the line and the hub's first answer.

    Args:
        url: ``ws://host:port`` or ``wss://host:port`` of the hub.
        greeting: what this side wants.
        expected: what a hub that agrees answers.
        ssl: certificates to trust, for ``wss``.
        timeout: seconds for the connection.
        patience: seconds for the answer.

    Raises:
        WireLost: there is no hub, or it does not do it; ``code`` tells why, where it said so.
        AuthenticationFailed: it refuses the token.
        RemoteProtocolError: what answers is no hub.
    """
    line = Line(await dial(url, ssl=ssl, timeout=timeout, what="hub"), asks=True)
    try:
        await line.say(greeting)
        said = await line.greeted(patience)
        if isinstance(said, m.Refused):
            if said.error == "authentication":
                raise AuthenticationFailed(url, said.reason)
            if said.error == "unexpected":
                raise _no_hub(url)
            raise WireLost(said.reason, said.error)
        if not isinstance(said, expected):
            raise _no_hub(url)
    except BaseException:
        await line.wire.close()
        raise
    return line, said


def _no_hub(url: str) -> RemoteProtocolError:
    return RemoteProtocolError("unexpected", f"{url} is no hub, or one of another release")


async def call(
    url: str,
    node: str,
    *,
    token: str | None = None,
    ssl: ssl_module.SSLContext | None = None,
    timeout: float = 10.0,
) -> Wire:
    """A wire to a node, through the hub that it is enrolled with.

    Raises:
        WireLost: there is no hub, or no such node, or the node does not dial back (``code``).
        AuthenticationFailed: the hub refuses the token.
        RemoteProtocolError: what answers is no hub.
    """
    patience = limits.DIAL_BACK_SECONDS + _MARGIN_SECONDS
    greeting = m.Call(m.VERSION, token, node)
    line, _ = await open_line(
        url, greeting, (m.Through,), ssl=ssl, timeout=timeout, patience=patience
    )
    return line.wire


async def answer(url: str, ticket: bytes, *, ssl: ssl_module.SSLContext | None = None) -> Wire:
    """A wire to the client that has called, through the hub that told the ticket.

    Raises:
        WireLost: there is no hub any more, or it does not know the ticket.
        RemoteProtocolError: what answers is no hub.
    """
    line, _ = await open_line(url, m.Answer(m.VERSION, ticket), (m.Through,), ssl=ssl)
    return line.wire
