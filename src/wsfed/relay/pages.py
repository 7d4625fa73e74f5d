"""What a hub shows to a browser and to a monitor: who is connected, and how much went through.

The page has no script and takes no input; names come from nodes and are escaped. Where clients
need a token, so does the page: as the password of HTTP's basic authentication, or as a bearer.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import html
import time
from collections.abc import Iterator
from typing import Final

from wsfed.relay.registry import Member, Registry
from wsfed.transport.websocket import Page

__all__ = ["Pages"]

#: Nothing but the page itself and its style sheet is loaded, and nobody frames it.
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
#: Rows of the page: enough to look at, few enough to be made between two messages.
_ROWS: Final = 500
#: Seconds between two looks of a browser's.
_REFRESH: Final = 5

_STYLE: Final = """\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #8886; }
td { vertical-align: top; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 45rem) {
  thead { display: none; }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid #8886; }
  td { display: flex; gap: 1rem; padding: .1rem 0; border: 0; text-align: left; }
  td::before { content: attr(data-label); flex: 0 0 7rem; opacity: .7; text-align: left; }
}
"""

#: Headings of the table; those of numbers are on the right.
_WORDS: Final = ("node", "profile", "tags", "since (UTC)")
_NUMBERS: Final = ("sessions", "to it", "from it")


class Pages:
    """Answers of a hub to plain HTTP.

    Args:
        registry: whose content is shown.
        token: what has to be shown for it; ``None`` shows it to everybody.
    """

    def __init__(self, registry: Registry, token: str | None) -> None:
        self._registry, self._token = registry, token

    def answer(self, path: str, authorization: str) -> Page | None:
        """The page at a path, or ``None`` where there is none."""
        made = {"/": self._page, "/metrics": self._metrics, "/style.css": _style}.get(path)
        if made is None:
            return None
        if not self._may(authorization):
            headers = {**_HEADERS, "WWW-Authenticate": 'Basic realm="wsfed hub", charset="UTF-8"'}
            return Page("The password is the hub's token.\n", 401, headers=headers)
        return made()

    def _may(self, authorization: str) -> bool:
        if self._token is None:
            return True
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        return hmac.compare_digest(value.strip().encode(), self._token.encode())

    # --- for people ---

    def _page(self) -> Page:
        members = list(self._registry.members.values())
        count = "1 node is" if len(members) == 1 else f"{len(members):,} nodes are"
        rows = "".join(map(_row, members[:_ROWS]))
        more = f"<p>The first {_ROWS} are shown.</p>" if len(members) > _ROWS else ""
        text = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="refresh" content="{_REFRESH}">'
            '<meta name="viewport" content="width=device-width">'
            '<title>wsfed hub</title><link rel="stylesheet" href="/style.css"></head><body><main>'
            f"<h1>wsfed hub</h1><p>{count} connected.</p>"
            f'<div class="scroll"><table><thead><tr>{_headings()}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>{more}</main></body></html>\n"
        )
        return Page(text, kind="text/html; charset=utf-8", headers=_HEADERS)

    # --- for monitors ---

    def _metrics(self) -> Page:
        return Page("".join(self._lines()), kind=_METRICS_KIND, headers=_HEADERS)

    def _lines(self) -> Iterator[str]:
        members = list(self._registry.members.values())
        yield from _metric("nodes", "gauge", "Nodes that are enrolled.", len(members))
        yield from _metric(
            "watchers", "gauge", "Clients that are told of nodes.", self._registry.watchers
        )
        total = self._registry.total
        yield from _metric("sessions", "gauge", "Connections relayed now.", total.sessions)
        yield from _metric("sessions_total", "counter", "Connections relayed.", total.begun)
        yield from _metric("to_nodes_bytes_total", "counter", "Bytes to nodes.", total.down)
        yield from _metric("from_nodes_bytes_total", "counter", "Bytes from nodes.", total.up)


#: The text format of Prometheus.
_METRICS_KIND: Final = "text/plain; version=0.0.4; charset=utf-8"


def _metric(name: str, kind: str, says: str, value: int) -> Iterator[str]:
    yield f"# HELP wsfed_hub_{name} {says}\n# TYPE wsfed_hub_{name} {kind}\n"
    yield f"wsfed_hub_{name} {value}\n"


def _style() -> Page:
    return Page(_STYLE, kind="text/css; charset=utf-8", headers=_HEADERS)


def _headings() -> str:
    words = [f'<th scope="col">{name}</th>' for name in _WORDS]
    numbers = [f'<th scope="col" class="number">{name}</th>' for name in _NUMBERS]
    return "".join([*words, *numbers])


def _row(member: Member) -> str:
    said, traffic = member.announced, member.traffic
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(member.since))
    words = (said.node, said.profile, ", ".join(said.tags), since)
    numbers = (f"{traffic.sessions:,}", _size(traffic.down), _size(traffic.up))
    cells = [
        f'<td data-label="{label}">{html.escape(word)}</td>'
        for label, word in zip(_WORDS, words, strict=True)
    ]
    cells += [
        f'<td data-label="{label}" class="number">{number}</td>'
        for label, number in zip(_NUMBERS, numbers, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
