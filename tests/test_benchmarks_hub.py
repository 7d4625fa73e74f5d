"""What a hub costs is measured of a hub that does its work."""

from __future__ import annotations

import pytest
from benchmarks.hub import measure

from wsfed.protocol import limits


@pytest.mark.blocking
@pytest.mark.processes
async def test_idle_nodes_and_what_is_relayed_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "HEARTBEAT_SECONDS", 0.05)
    found = await measure(nodes=3, repetitions=1)
    signs = "CPU of a core for their signs of life, %"
    assert set(found["idle"]) == {"CPU-s to start", "MiB", "3 idle nodes", signs}
    assert all(value > 0 for value in found["relayed"]["direct"].values())
    assert set(found["relayed"]["through the hub"]) - set(found["relayed"]["direct"]) == {
        "the hub's CPU, s a GiB"
    }
