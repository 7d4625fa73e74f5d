"""A hub: connects clients with nodes that cannot listen, and does not read what they say.

Nodes dial out and keep a connection; a client that wants a session with one of them dials the hub,
which asks the node to dial once more and joins the two connections. Needs no torch.
"""

from __future__ import annotations

from wsfed.relay.hub import Hub

__all__ = ["Hub"]
