"""A worker node: sessions, their threads, and the connections that come and go."""

from __future__ import annotations

from wsfed.node.enrolment import Enrolment
from wsfed.node.node import Node, check_exposure, default_max_memory

__all__ = ["Enrolment", "Node", "check_exposure", "default_max_memory"]
