"""Takes tensors from one worker to another, without a detour through the client.

The client tells the receiving worker a ticket and the identifiers, and the sending worker the
ticket and the address. The ticket is all the authority the carrier has: the session it opens may
store under these identifiers and do nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from wsfed.errors import RemoteError, RemoteProtocolError
from wsfed.protocol import messages as m
from wsfed.protocol.codec import Buffer, Outgoing
from wsfed.protocol.session import Ended, Opened, RefusedByPeer, Role, Session, Silent, State
from wsfed.protocol.stream import Delivery
from wsfed.transport.pump import pump
from wsfed.transport.wire import Wire, WireLost

__all__ = ["carry"]


class _Carrier:
    """The carrier's end of its session (:class:`~wsfed.transport.pump.End`)."""

    def __init__(self, now: float, ticket: bytes) -> None:
        self.wake = asyncio.Event()
        self.error: Exception | None = None
        self.delivered = False
        self._session = Session(Role.CLIENT, lambda _: None)
        self._session.hello(now, token=None, ticket=ticket, client="wsfed carrier")

    def put(self, id: int, requires_grad: bool, tensor: Outgoing) -> None:
        store = m.Store(id, 0, requires_grad, False)
        self._session.sender.put_tensor(lambda place: store.wire(tensor=place), tensor)

    def flush(self) -> None:
        self._session.sender.put(m.Flush(1).wire())

    @property
    def over(self) -> bool:
        return self._session.state is State.GONE

    def leave(self) -> None:
        if self._session.state is not State.GONE:
            self._session.end("the worker's program has ended")

    @property
    def next_tick(self) -> float | None:
        return self._session.next_tick

    def next_frame(self, now: float) -> Sequence[Buffer] | None:
        return self._session.next_frame(now)

    def arrived(self, data: Buffer, now: float) -> None:
        try:
            events = self._session.receive(data, now)
        except RemoteProtocolError as error:
            self.broken(error, now)
            return
        for event in events:
            match event:
                case Delivery():
                    self._replied(event)
                case RefusedByPeer(_, reason):
                    self.error = WireLost(reason)
                case Ended(reason):
                    self.error = RemoteError(reason, type="SessionLost")
                case Opened():
                    pass
        self.wake.set()

    def _replied(self, delivery: Delivery) -> None:
        for raw in delivery.messages:
            match m.parse(raw, (m.REPLIES,)):
                case m.ValueReply():
                    self.delivered = True
                case m.Failed(failure=failure) | m.RequestFailed(failure=failure):
                    self.error = self.error or RemoteError(
                        failure[2], type=failure[1], op=failure[3], shapes=failure[4]
                    )
        if self.delivered or self.error:
            self._session.end("delivered")

    def broken(self, error: Exception, now: float) -> None:
        self.error = error
        self._session.end()
        self.wake.set()

    def tick(self, now: float) -> None:
        for event in self._session.tick(now):
            if isinstance(event, Silent):
                self.broken(WireLost("the other worker does not answer"), now)


async def carry(
    wire: Wire, ticket: bytes, ids: Sequence[int], tensors: Sequence[tuple[bool, Outgoing]]
) -> None:
    """Bring tensors to the worker at the other end of ``wire``.

    Args:
        wire: freshly dialled.
        ticket: what the receiving worker expects.
        ids: identifiers in the receiving session.
        tensors: requires_grad and value, one for each identifier.

    Raises:
        WireLost: the worker went away, or does not know the ticket.
        RemoteError: it could not take a tensor.
    """
    carrier = _Carrier(asyncio.get_running_loop().time(), ticket)
    for id, (requires_grad, tensor) in zip(ids, tensors, strict=True):
        carrier.put(id, requires_grad, tensor)
    carrier.flush()
    reason = await pump(wire, carrier)
    if carrier.error is not None:
        raise carrier.error
    if not carrier.delivered:
        raise WireLost(reason)
