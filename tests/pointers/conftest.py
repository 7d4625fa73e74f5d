"""Workers within this process, blocking and not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

import wsfed
from wsfed import sync


@pytest.fixture
def bob() -> Iterator[sync.VirtualWorker]:
    with sync.VirtualWorker("bob") as worker:
        yield worker


@pytest.fixture
def alice() -> Iterator[sync.VirtualWorker]:
    with sync.VirtualWorker("alice") as worker:
        yield worker


@pytest.fixture
async def carol() -> AsyncIterator[wsfed.VirtualWorker]:
    """A worker whose results are awaited."""
    async with wsfed.VirtualWorker("carol") as worker:
        yield worker
