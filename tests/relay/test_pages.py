"""What a hub shows: to people, escaped and without scripts; to monitors, numbers; by token."""

from __future__ import annotations

import asyncio
import base64
from urllib.parse import urlsplit

import pytest

from tests.relay.nodes import enrolled_by_hand, joined, until
from wsfed.relay import Hub
from wsfed.transport.line import call


async def get(url: str, path: str, authorization: str = "") -> tuple[int, dict[str, str], str]:
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    shown = f"Authorization: {authorization}\r\n" if authorization else ""
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{shown}Connection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    status, *headers = head.split("\r\n")
    named = dict(line.split(": ", 1) for line in headers)
    assert len(named) == len(headers), "no header is sent twice"
    return int(status.split()[1]), named, body


async def test_the_page_shows_who_is_there_with_names_escaped() -> None:
    async with Hub().listen() as url:
        _, headers, text = await get(url, "/")
        assert "0 nodes are connected" in text
        async with enrolled_by_hand(url, "<script>alert(1)</script>&'\""):
            status, headers, text = await get(url, "/")
    assert status == 200
    assert "1 node is connected" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;&#x27;&quot;" in text
    assert "<script" not in text and "digits" in text
    assert 'http-equiv="refresh"' in text
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'self'")
    assert "style=" not in text and "onload" not in text
    assert headers["X-Content-Type-Options"] == "nosniff"


async def test_everything_the_page_needs_is_there() -> None:
    async with Hub().listen() as url:
        status, headers, text = await get(url, "/style.css")
        assert (status, headers["Content-Type"]) == (200, "text/css; charset=utf-8")
        assert "table" in text
        assert (await get(url, "/healthz"))[::2] == (200, "ok\n")
        status, _, text = await get(url, "/etc/passwd")
        assert (status, "connect with wsfed.hub(url)" in text) == (426, True)


async def test_metrics_count_sessions_and_bytes() -> None:
    hub = Hub()
    async with hub.listen() as url, enrolled_by_hand(url, "alice") as line:
        client, node = await joined(url, line, asyncio.ensure_future(call(url, "alice")))
        await client.send([bytes(100)])
        await node.receive()
        await node.send([bytes(7)])
        await client.receive()
        status, headers, text = await get(url, "/metrics")
        assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert dict(line.split(" ") for line in lines) == {
            "wsfed_hub_nodes": "1",
            "wsfed_hub_watchers": "0",
            "wsfed_hub_sessions": "1",
            "wsfed_hub_sessions_total": "1",
            "wsfed_hub_to_nodes_bytes_total": "100",
            "wsfed_hub_from_nodes_bytes_total": "7",
        }
        assert text.count("# HELP") == text.count("# TYPE") == len(lines)
        await client.close()
        await node.close()
        await until(lambda: hub.registry.total.sessions == 0)
        assert "wsfed_hub_sessions 0\n" in (await get(url, "/metrics"))[2]


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("path", ["/", "/metrics"])
async def test_a_hub_with_a_token_shows_nothing_without_it(path: str) -> None:
    async with Hub(token="s3cret").listen() as url:
        for wrong in ("", "Bearer wrong", "Basic !", basic("s3cret"), basic("s3cret:no"), "s3cret"):
            status, headers, text = await get(url, path, wrong)
            assert (status, "nodes" in text) == (401, False)
            assert headers["WWW-Authenticate"].startswith("Basic ")
        for right in ("Bearer s3cret", basic("anybody:s3cret")):
            assert (await get(url, path, right))[0] == 200
        assert (await get(url, "/healthz"))[0] == 200
