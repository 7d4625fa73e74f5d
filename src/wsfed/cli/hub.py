"""``wsfed hub``: a hub in the foreground. Loads no torch."""

from __future__ import annotations

import asyncio
import inspect
import json
import ssl as ssl_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wsfed.cli.serving import (
    AsJson,
    Host,
    Insecure,
    TlsCert,
    TlsKey,
    UntilEof,
    Verbose,
    cannot_listen,
    read_tls,
    read_token,
    set_up_log,
    stopped,
    usage,
)

if TYPE_CHECKING:
    from wsfed.relay import Hub

__all__ = ["hub"]

EXAMPLES = """
Examples:

  wsfed hub

  wsfed hub --token-file clients.txt --node-token-file nodes.txt

  wsfed hub --host 0.0.0.0 --tls-cert c.pem --tls-key k.pem --token-file t.txt

  wsfed worker --connect ws://127.0.0.1:8770 --id alice --tag digits
"""


def hub(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8770,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Only clients and nodes that show the token in this file get in."),
    ] = None,
    node_token_file: Annotated[
        Path | None, typer.Option(help="Nodes have to show the token in this file instead.")
    ] = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    insecure: Insecure = False,
    origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Let pages of this origin connect: https://example.org."),
    ] = None,
    until_eof: UntilEof = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a hub until it is interrupted or terminated: workers that cannot listen dial it.

    It relays sessions between them and clients without reading them. It binds 127.0.0.1 unless
    told otherwise; GET / shows who is connected, /metrics numbers, /healthz whether it is there.
    """
    set_up_log(verbose)
    from wsfed.relay import Hub
    from wsfed.transport.websocket import check_exposure

    refusal = check_exposure(
        host, tls=tls_cert is not None, token=token_file is not None, insecure=insecure
    )
    if refusal:
        usage(refusal)
    if node_token_file is not None and token_file is None:
        usage("--node-token-file goes with --token-file")
    made = Hub(
        token=read_token(token_file) if token_file else None,
        node_token=read_token(node_token_file, "--node-token-file") if node_token_file else None,
        origins=origin or (),
    )
    try:
        asyncio.run(_serve(made, host, port, read_tls(tls_cert, tls_key), as_json, until_eof))
    except OSError as error:
        cannot_listen(host, port, error)


hub.__doc__ = inspect.cleandoc(hub.__doc__ or "") + "\n" + EXAMPLES


async def _serve(
    made: Hub,
    host: str,
    port: int,
    ssl: ssl_module.SSLContext | None,
    as_json: bool,
    until_eof: bool,
) -> None:
    stop = stopped(until_eof)
    async with made.listen(host, port, ssl) as url:
        typer.echo(json.dumps({"url": url}) if as_json else f"hub on {url}")
        sys.stdout.flush()
        await stop.wait()
