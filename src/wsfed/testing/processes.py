"""Worker processes, for tests and measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["worker_process"]


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
    command = [sys.executable, "-m", "wsfed", "worker", "--json", "--port", "0", *options]
    errors = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the worker did not start (exit code {process.wait()})")
            yield {**json.loads(line), "pid": process.pid}
        finally:
            process.terminate()
            process.wait()
