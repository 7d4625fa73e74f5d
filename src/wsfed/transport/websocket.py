"""WebSockets: both ends of the wire that crosses machines."""

from __future__ import annotations

import ipaddress
import ssl as ssl_module
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from websockets.asyncio.client import connect as open_websocket
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import (
    ConnectionClosed,
    InvalidMessage,
    NegotiationError,
    WebSocketException,
)
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.typing import Origin, Subprotocol

from wsfed.errors import RemoteProtocolError
from wsfed.protocol import limits
from wsfed.protocol.codec import Buffer
from wsfed.transport.wire import SUBPROTOCOL, WireLost

__all__ = ["Page", "WebSocketWire", "check_exposure", "check_url", "dial", "is_loopback", "listen"]

#: Both ends. Compression is off: the noise in floats does not compress, and deflate triples the
#: memory of a connection. The library's pings are off: the protocol has signs of life of its own,
#: which a long upload counts as and does not suppress.
_SETTINGS: Final[dict[str, Any]] = {
    "compression": None,
    "ping_interval": None,
    "max_size": limits.MAX_FRAME_BYTES,
    # Messages that wait to be read: two chunks keep the socket busy while one is copied.
    "max_queue": 4,
    # Bytes the transport buffers before a send waits: one chunk.
    "write_limit": limits.CHUNK_BYTES,
    # A peer that does not answer a close is left after this time.
    "close_timeout": 2,
}


@dataclass(frozen=True, slots=True)
class Page:
    """What a plain HTTP request is answered with."""

    text: str
    status: int = 200
    kind: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


class WebSocketWire:
    """A :class:`~wsfed.transport.wire.Wire` over one WebSocket."""

    def __init__(self, socket: Connection) -> None:
        self._socket = socket

    async def send(self, message: Sequence[Buffer]) -> None:
        """See :class:`~wsfed.transport.wire.Wire`."""
        try:
            await self._socket.send(message[0] if len(message) == 1 else b"".join(message))
        except ConnectionClosed as error:
            raise WireLost(_reason(error)) from None
        except AttributeError:
            if not self._is_lost:
                raise
            raise WireLost("the connection broke") from None

    async def receive(self) -> Buffer:
        """See :class:`~wsfed.transport.wire.Wire`."""
        try:
            message = await self._socket.recv()
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == 1009 and not error.rcvd_then_sent:
                raise RemoteProtocolError("frame-size", "a message was too large") from None
            raise WireLost(_reason(error)) from None
        if isinstance(message, str):
            raise RemoteProtocolError("text", "only binary messages are understood here")
        return message

    async def close(self, reason: str = "") -> None:
        """See :class:`~wsfed.transport.wire.Wire`."""
        try:
            await self._socket.close(reason=reason.encode()[:120].decode(errors="ignore"))
        except AttributeError:
            if not self._is_lost:
                raise

    @property
    def _is_lost(self) -> bool:
        """asyncio's transport that was lost with data in its buffer cannot be aborted any more
        (CPython 3.11), which websockets does to make sure.
        """
        return self._socket.state is State.CLOSED


def _reason(error: ConnectionClosed) -> str:
    frame = error.rcvd or error.sent
    if frame is None:
        return "the connection broke"
    return f"the connection was closed ({frame.reason or frame.code})"


def check_url(url: str, ssl: ssl_module.SSLContext | None = None) -> str:
    """The host of the URL of a worker or hub.

    Raises:
        ValueError: the URL is not one of a WebSocket, or has no TLS for ``ssl``.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(f"{url!r} is not the URL of a worker; write ws://host:port")
    if ssl is not None and parts.scheme != "wss":
        raise ValueError(f"ssl= is for TLS, and {url} has none; is it wss://?")
    return parts.hostname


async def dial(
    url: str,
    *,
    ssl: ssl_module.SSLContext | None = None,
    timeout: float = 10,
    what: str = "worker",
) -> WebSocketWire:
    """Connect to a worker or a hub.

    Args:
        url: ``ws://host:port`` or ``wss://host:port``.
        ssl: certificates to trust, for ``wss``.
        timeout: seconds for the connection and the handshake of the WebSocket.
        what: is looked for there, for errors.

    Raises:
        WireLost: there is no worker, or it does not speak the protocol.
        ValueError: the URL is not one of a WebSocket.
    """
    host = check_url(url, ssl)
    options: dict[str, Any] = {"ssl": ssl} if ssl is not None else {}
    proxy: Literal[True] | None = None if is_loopback(host) else True
    try:
        socket = await open_websocket(
            url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            open_timeout=timeout,
            proxy=proxy,
            **_SETTINGS,
            **options,
        )
    except TimeoutError:
        raise WireLost(f"nothing answered within {timeout:g} s") from None
    except (OSError, WebSocketException, EOFError) as error:
        raise WireLost(_refusal(error, url, what)) from None
    if socket.subprotocol != SUBPROTOCOL:
        await socket.close()
        raise WireLost(f"the server there does not speak {SUBPROTOCOL}; is it a wsfed {what}?")
    return WebSocketWire(socket)


def _refusal(error: Exception, url: str, what: str) -> str:
    if isinstance(error, ssl_module.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message}); give one that is with "
            "ssl=ssl.create_default_context(cafile=...), or --tls-ca"
        )
    if url.startswith("wss:") and isinstance(error, ssl_module.SSLError | ConnectionResetError):
        return f"no TLS is spoken there ({type(error).__name__}); is it ws://?"
    if url.startswith("ws:") and isinstance(error, InvalidMessage):
        return "what answers speaks no HTTP; is it wss://?"
    if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
        return f"the connection was refused; is a {what} running there?"
    return f"{type(error).__name__}: {error}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, *, tls: bool, token: bool, insecure: bool) -> str | None:
    """Why a worker or hub should not listen on ``host``, or ``None`` where it may.

    Beyond this machine it needs TLS and a token, unless its owner says in so many
    words that the network is trusted.
    """
    if is_loopback(host) or insecure or (tls and token):
        return None
    missing = " and no ".join(word for word, there in (("TLS", tls), ("token", token)) if not there)
    return (
        f"{host} can be reached from other machines, and it has no {missing}; give --tls-cert, "
        "--tls-key and --token-file, or say --insecure if every machine there is trusted"
    )


@asynccontextmanager
async def listen(
    serve_wire: Callable[[WebSocketWire], Awaitable[None]],
    *,
    host: str,
    port: int,
    ssl: ssl_module.SSLContext | None = None,
    health: Callable[[], str] = lambda: "ok",
    pages: Callable[[str, str], Page | None] = lambda path, authorization: None,
    origins: Sequence[str] = (),
    what: str = "worker",
) -> AsyncIterator[tuple[str, int]]:
    """Accept connections while the context lasts; gives the address that is listened on.

    A browser says which page wants to connect; only those of ``origins`` may. Programs say none.

    Args:
        serve_wire: called for each connection; the connection ends with it.
        host: address to bind.
        port: 0 takes a free one.
        ssl: the certificate.
        health: what ``GET /healthz`` answers.
        pages: what ``GET`` of another path answers; told the path and the header
            ``Authorization``.
        origins: such as ``"https://example.org"``.
        what: this is, for those that want something else.

    Raises:
        OSError: the address cannot be bound.
    """

    def choose(socket: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol:
        if SUBPROTOCOL not in offered:
            raise NegotiationError(f"this is a wsfed {what}: it speaks {SUBPROTOCOL} only")
        return Subprotocol(SUBPROTOCOL)

    async def handle(socket: ServerConnection) -> None:
        await serve_wire(WebSocketWire(socket))

    def answer_http(socket: ServerConnection, request: Request) -> Response | None:
        if request.path == "/healthz":
            return socket.respond(200, health() + "\n")
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return None
        shown = request.headers.get("Authorization", "")
        page = pages(request.path, shown) or Page(
            f"This is a wsfed {what}: connect with wsfed.{_CONNECTS[what]}(url).\n", 426
        )
        response = socket.respond(page.status, page.text)
        del response.headers["Content-Type"]
        for name, value in {"Content-Type": page.kind, **page.headers}.items():
            response.headers[name] = value
        return response

    server: Server
    async with serve(
        handle,
        host,
        port,
        ssl=ssl,
        origins=[None, *map(Origin, origins)],
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        select_subprotocol=choose,
        process_request=answer_http,
        open_timeout=limits.HANDSHAKE_SECONDS,
        server_header=None,
        **_SETTINGS,
    ) as server:
        address = next(iter(server.sockets)).getsockname()
        yield address[0], address[1]


#: How a program connects to each.
_CONNECTS: Final = {"worker": "connect", "hub": "hub"}
