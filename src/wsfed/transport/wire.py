"""The seam between the protocol and whatever carries its frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from wsfed.protocol.codec import Buffer

__all__ = ["SUBPROTOCOL", "Wire", "WireLost"]

#: The WebSocket subprotocol: one number for everything that is said on the wire.
SUBPROTOCOL: Final = "wsfed.1"


class WireLost(Exception):
    """The other side is gone, or cannot be reached.

    Attributes:
        reason: what the transport said.
        code: a short word where whoever is there has told why, else ``""``.
    """

    def __init__(self, reason: str, code: str = "") -> None:
        self.reason, self.code = reason, code
        super().__init__(reason)


class Wire(Protocol):
    """Carries binary messages, whole and in order, until it is lost."""

    async def send(self, message: Sequence[Buffer]) -> None:
        """Send one message, given in pieces. Waits while the other side does not read.

        Raises:
            WireLost: the other side is gone.
        """

    async def receive(self) -> Buffer:
        """The next message.

        Raises:
            WireLost: the other side is gone.
            RemoteProtocolError: the message was not binary, or was too large.
        """

    async def close(self, reason: str = "") -> None:
        """Close, and return when it is done. May be called twice."""
