"""Worker processes, for tests and measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["hub_process", "worker_process"]


@contextmanager
def worker_process(*options: str, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """A worker process on a free port of this machine, ended when the context is left.

    Args:
        options: of ``wsfed worker``, such as ``"--threads", "1"``.
        quiet: let nothing of its standard error through.

    Returns:
        What the worker tells of itself (``url``, ``id`` …), and ``pid``.

    Raises:
        RuntimeError: it did not start.
    """
    with _process("worker", "--port", "0", *options, quiet=quiet) as told:
        yield told


@contextmanager
def hub_process(*options: str, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """A hub process on this machine, on a free port unless told otherwise, for as long as a
    context lasts.

    Args:
        options: of ``wsfed hub``, such as ``"--token-file", "token.txt"``.
        quiet: let nothing of its standard error through.

    Returns:
        ``url`` and ``pid``.

    Raises:
        RuntimeError: it did not start.
    """
    with _process("hub", "--port", "0", *options, quiet=quiet) as told:
        yield told


@contextmanager
def _process(*words: str, quiet: bool) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "wsfed", words[0], "--json", *words[1:]]
    errors = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the {words[0]} did not start (exit code {process.wait()})")
            yield {**json.loads(line), "pid": process.pid}
        finally:
            process.terminate()
            process.wait()
