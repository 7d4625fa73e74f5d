"""Start worker processes on this machine, each with a part of a data set of its own.

    python scripts/start_workers.py --workers 4

prints one JSON document with the workers' URLs, waits, and stops them when it is interrupted,
terminated, or (with --until-eof) when its standard input is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import digits

CHECKOUT = Path(__file__).resolve().parent.parent
#: Importing torch takes a few seconds on a small machine, and longer on a busy one.
START_SECONDS = 120
STOP_SECONDS = 10


class WorkerFailed(Exception):
    """A worker process did not start; the text says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    options = parse(argv)
    try:
        asyncio.run(serve(options))
    except WorkerFailed as error:
        print(f"start_workers: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, help="how many (default as many as names, ports or files, else 4)"
    )
    parser.add_argument("--ids", nargs="*", help="their names (default worker-1, worker-2, …)")
    parser.add_argument(
        "--ports", nargs="*", type=int, help="their ports (default 0 for each: any free one)"
    )
    parser.add_argument(
        "--data",
        nargs="*",
        default=["digits"],
        metavar="FILE",
        help="'digits' (scikit-learn's, cut into parts), or one file for each worker",
    )
    parser.add_argument("--dataset", default="data", help="what workers call their file (data)")
    parser.add_argument("--split", choices=("iid", "label"), default="iid", help="of the digits")
    parser.add_argument(
        "--folder",
        type=Path,
        default=CHECKOUT / "runs" / "data",
        help="where the parts are written (default runs/data)",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads a worker (default 1)")
    parser.add_argument("--json-file", type=Path, help="write the JSON there, too")
    parser.add_argument("--until-eof", action="store_true", help="stop when stdin is closed")
    options = parser.parse_args(argv)
    own = options.data != ["digits"]
    counts = [len(given) for given in (options.ids, options.ports, own and options.data) if given]
    if options.workers is None:
        options.workers = counts[0] if counts else 4
    count = options.workers
    options.dataset = options.dataset if own else "digits"
    options.ids = options.ids or [f"worker-{number + 1}" for number in range(count)]
    options.ports = options.ports or [0] * count
    if count < 1:
        parser.error("at least one worker")
    if len(options.ids) != count or len(set(options.ids)) != count:
        parser.error(f"--ids has to give {count} different names")
    if len(options.ports) != count:
        parser.error(f"--ports has to give {count} ports")
    if own and len(options.data) != count:
        parser.error(f"--data has to give {count} files, one for each worker")
    return options


async def serve(options: argparse.Namespace) -> None:
    """Start the workers, tell where they are, wait, stop them."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    if options.until_eof:
        loop.add_reader(sys.stdin.fileno(), lambda: sys.stdin.buffer.read1() or stop.set())
    files, test = prepare(options)
    async with AsyncExitStack() as stack:
        processes = []
        for id, port, file in zip(options.ids, options.ports, files, strict=True):
            process = await spawn(id, port, f"{options.dataset}={file}", options.threads)
            stack.push_async_callback(end, process)
            processes.append(process)
        workers = [
            await ready(process, id, options.dataset)
            for process, id in zip(processes, options.ids, strict=True)
        ]
        tell(
            {
                "workers": workers,
                "dataset": options.dataset,
                "split": options.split if test else None,
                "test": test,
            },
            options,
        )
        dead = [asyncio.ensure_future(process.wait()) for process in processes]
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait([stopped, *dead], return_when=asyncio.FIRST_COMPLETED)
        for future in (stopped, *dead):
            future.cancel()
        if not stop.is_set():
            codes = {id: each.returncode for id, each in zip(options.ids, processes, strict=True)}
            ended = [describe_end(id, code) for id, code in codes.items() if code is not None]
            raise WorkerFailed(f"{' and '.join(ended)}; the others are stopped")


def prepare(options: argparse.Namespace) -> tuple[list[str], str | None]:
    """The data files, one for each worker, and the one with the held-out rows."""
    if options.data != ["digits"]:
        return [str(Path(file).resolve()) for file in options.data], None
    train, test = digits.load()
    folder = options.folder.resolve()
    files = []
    for id, part in zip(
        options.ids, digits.split(train, options.workers, options.split), strict=True
    ):
        path = folder / f"{id}.npz"
        part.save(path)
        files.append(str(path))
    test.save(folder / "test.npz")
    return files, str(folder / "test.npz")


async def spawn(id: str, port: int, dataset: str, threads: int) -> asyncio.subprocess.Process:
    """Start a worker process; what it has to say of errors goes to this program's stderr."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "wsfed", "worker", "--json", "--id", id, "--port", str(port)),
        *("--dataset", dataset, "--threads", str(threads)),
        # Should this program be killed, its workers see the end of their input, and end.
        "--until-eof",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C is for this program, which then stops its workers in order.
        start_new_session=True,
    )


async def ready(process: asyncio.subprocess.Process, id: str, dataset: str) -> dict[str, Any]:
    """Wait until a worker has told where it is."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            line = await process.stdout.readline()
    except TimeoutError:
        raise WorkerFailed(f"{id} was not ready within {START_SECONDS} s") from None
    if not line:
        raise WorkerFailed(f"{id} did not start; its message is above")
    told: dict[str, Any] = json.loads(line)
    rows = told["datasets"][dataset]["rows"]
    return {"id": id, "url": told["url"], "pid": process.pid, "rows": rows}


def describe_end(id: str, code: int) -> str:
    """How a process that should have gone on has ended."""
    if code >= 0:
        return f"{id} ended with exit code {code}"
    try:
        return f"{id} was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"{id} was ended by signal {-code}"


async def end(process: asyncio.subprocess.Process) -> None:
    """Ask a process to end, and see that it does."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def tell(started: dict[str, Any], options: argparse.Namespace) -> None:
    """Tell where the workers are; the file is whole as soon as it is there."""
    text = json.dumps(started, indent=2)
    if options.json_file:
        options.json_file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = options.json_file.with_suffix(".part")
        unfinished.write_text(text + "\n")
        unfinished.replace(options.json_file)
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
