"""``wsfed status``: whether workers answer, and what they are."""

from __future__ import annotations

import asyncio
import json
import ssl as ssl_module
import time
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["status"]


def status(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="ws://host:port")],
    token: Annotated[
        str | None, typer.Option(envvar="WSFED_TOKEN", help="Shown to workers that ask.")
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Certificates to trust (PEM), for wss://.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Tell it as JSON.")] = False,
) -> None:
    """Ask workers how they are. Exit code 1 if one of them does not answer.

    Examples:

      wsfed status ws://127.0.0.1:8777

      wsfed status --json ws://10.0.0.5:8777 ws://10.0.0.6:8777

      wsfed status --tls-ca cert.pem wss://clinic.example:8777
    """
    answers = asyncio.run(_ask_all(urls, token, _trust(tls_ca), timeout))
    if as_json:
        typer.echo(json.dumps(answers, indent=2))
    else:
        _show(answers)
    if any("error" in answer for answer in answers):
        raise typer.Exit(1)


def _trust(ca: Path | None) -> ssl_module.SSLContext | None:
    if ca is None:
        return None
    try:
        return ssl_module.create_default_context(cafile=ca)
    except OSError as error:
        raise typer.BadParameter(f"--tls-ca {ca}: {error.strerror or error}") from None


async def _ask_all(
    urls: list[str], token: str | None, ssl: ssl_module.SSLContext | None, timeout: float
) -> list[dict[str, Any]]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_ask(url, token, ssl, timeout)) for url in urls]
    return [task.result() for task in tasks]


async def _ask(
    url: str, token: str | None, ssl: ssl_module.SSLContext | None, timeout: float
) -> dict[str, Any]:
    from wsfed.client.worker import connect
    from wsfed.errors import WsfedError

    begun = time.perf_counter()
    try:
        ssl = ssl if url.startswith("wss:") else None
        connecting = connect(url, token=token, ssl=ssl, timeout=timeout)
        async with asyncio.timeout(timeout), connecting as worker:
            await worker.flush()
            return {
                "url": url,
                "milliseconds": round((time.perf_counter() - begun) * 1e3, 1),
                **worker.info,
            }
    except TimeoutError:
        return {"url": url, "error": f"nothing answered within {timeout:g} s"}
    except (WsfedError, ValueError) as error:
        return {"url": url, "error": getattr(error, "reason", str(error))}


def _show(answers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("worker", "device", "torch", "answers", "data sets", box=None, pad_edge=False)
    table.add_column("url", no_wrap=True)
    for answer in answers:
        if "error" in answer:
            table.add_row("-", "", "", "[red]no[/]", f"[red]{answer['error']}[/]", answer["url"])
            continue
        datasets = ", ".join(
            f"{name} ({each['rows']} rows{', open' if each['open'] else ''})"
            for name, each in answer["datasets"].items()
        )
        took = f"{answer['milliseconds']:.0f} ms"
        version = answer["torch"].split("+")[0]
        table.add_row(
            answer["id"], answer["device"], version, took, datasets or "none", answer["url"]
        )
    Console().print(table)
