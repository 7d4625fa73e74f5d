"""What ``wsfed worker`` and ``wsfed hub`` have in common: tokens, certificates, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import ssl as ssl_module
import threading
from pathlib import Path
from typing import Annotated, NoReturn, TypeAlias

import typer

__all__ = [
    *("AsJson", "Host", "Insecure", "TlsCert", "TlsKey", "UntilEof", "Verbose"),
    *("cannot_listen", "fail", "read_tls", "read_token", "set_up_log", "stopped", "usage"),
]

Host: TypeAlias = Annotated[str, typer.Option(help="Address to listen on.")]
TlsCert: TypeAlias = Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")]
TlsKey: TypeAlias = Annotated[Path | None, typer.Option(help="Its private key (PEM).")]
Insecure: TypeAlias = Annotated[
    bool, typer.Option("--insecure", help="Listen beyond this machine without TLS and token.")
]
UntilEof: TypeAlias = Annotated[
    bool, typer.Option("--until-eof", help="End, too, when standard input is closed.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Tell the address as JSON.")]
Verbose: TypeAlias = Annotated[bool, typer.Option("-v", "--verbose", help="Log connections.")]


def set_up_log(verbose: bool) -> None:
    """To standard error; connections only where that is asked for."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def read_token(file: Path, option: str = "--token-file") -> str:
    """The token in a file; ends the program where there is none."""
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{option} {file}: {getattr(error, 'strerror', None) or error}")
    if not token or len(token.split()) > 1:
        usage(f"{option} {file}: it has to hold one word, the token")
    return token


def read_tls(cert: Path | None, key: Path | None) -> ssl_module.SSLContext | None:
    """A server's certificate; ends the program where it is none."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        usage("--tls-cert and --tls-key go together")
    context = ssl_module.SSLContext(ssl_module.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl_module.SSLError) as error:
        fail(f"{cert}, {key}: {error}")
    return context


def stopped(until_eof: bool) -> asyncio.Event:
    """Set when the program is interrupted or terminated, or its standard input is closed."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if until_eof:
        threading.Thread(target=_read_to_the_end, args=(loop, stop), daemon=True).start()
    return stop


def _read_to_the_end(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Whoever started this program holds the other end of its standard input, and may be killed."""
    while os.read(0, 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop has ended by itself
        loop.call_soon_threadsafe(stop.set)


def cannot_listen(host: str, port: int, error: OSError) -> NoReturn:
    """The address cannot be bound."""
    advice = "; try --port 0" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
    fail(f"cannot listen on {host}:{port}: {error.strerror or error}{advice}")


def usage(text: str) -> NoReturn:
    """Wrong usage: exit code 2."""
    raise typer.BadParameter(text)


def fail(text: str) -> NoReturn:
    """It does not work: exit code 1."""
    typer.secho(f"wsfed: {text}", fg="red", err=True)
    raise typer.Exit(1)
