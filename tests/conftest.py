"""What every test is held to: the event loop is never blocked."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

import pytest
import torch
from blockbuster import blockbuster_ctx

# Before any loop is made: debug mode reports callbacks that take long.
os.environ["PYTHONASYNCIODEBUG"] = "1"

#: Seconds that a step of wsfed's may hold the loop; the machine may be busy with other things.
SLOW = 0.5


#: What a test or a program computes on its own loop is its own affair.
_PROGRAMS = ("coro=<test_", "fixture", "/scripts/train.py")


class _SlowSteps(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        took = re.search(r"took ([\d.]+) seconds", said)
        if took and float(took[1]) > SLOW and not any(part in said for part in _PROGRAMS):
            self.found.append(said)


@pytest.fixture(autouse=True, scope="session")
def torch_is_warm() -> None:
    """torch reads files of its own when an optimizer takes its first step; not ours to blame."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    for kind in (torch.optim.SGD, torch.optim.Adam):
        kind([parameter], lr=0.1).step()


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which wsfed holds up an event loop; ``blocking`` tests do so on purpose."""
    slow, logger = _SlowSteps(), logging.getLogger("asyncio")
    logger.addHandler(slow)
    try:
        if request.node.get_closest_marker("blocking"):
            yield
        else:
            with blockbuster_ctx("wsfed"):
                yield
    finally:
        logger.removeHandler(slow)
    assert not slow.found, "the event loop was blocked:\n" + "\n".join(slow.found)
