"""Tools for testing workers and what is built on them.

- :func:`check_worker`: whether a worker behaves as every worker has to. One suite for workers in
  this process, behind a socket, and whatever comes later.
- :class:`Recorder`: what passes between client and worker, and how often the client waited.
- :class:`FaultyWire`: a wire that breaks after so many messages.
- :func:`worker_process`, :func:`hub_process`: a process for as long as a context lasts.
- :func:`worker_over`: a worker's handle over any wire; :func:`memory_wires`: two ends of one.
- :mod:`wsfed.testing.coverage`: torch's own test databases, run through pointers.
"""

from __future__ import annotations

from wsfed.testing.conformance import CHECKS, Connect, check_worker
from wsfed.testing.processes import hub_process, worker_process
from wsfed.testing.wires import FaultyWire, Recorder, worker_over
from wsfed.transport.memory import pair as memory_wires
from wsfed.transport.websocket import dial
from wsfed.transport.wire import Wire, WireLost

__all__ = [
    "CHECKS",
    "Connect",
    "FaultyWire",
    "Recorder",
    "Wire",
    "WireLost",
    "check_worker",
    "dial",
    "hub_process",
    "memory_wires",
    "worker_over",
    "worker_process",
]
