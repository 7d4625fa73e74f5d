"""``wsfed worker``: a worker node in the foreground."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import re
import ssl as ssl_module
import sys
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
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
    fail,
    read_tls,
    read_token,
    set_up_log,
    stopped,
    usage,
)

if TYPE_CHECKING:
    from wsfed.node import Enrolment, Node
    from wsfed.privacy.roster import Membership
    from wsfed.worker.datasets import Dataset
    from wsfed.worker.providers import Provider
    from wsfed.worker.strict import Ledger
    from wsfed.worker.transforms import Transform

__all__ = ["parse_size", "worker"]

EXAMPLES = """
Examples:

  wsfed worker --id bob --port 8777

  wsfed worker --id clinic --dataset scans=scans.npz --max-memory 8GB

  wsfed worker --dataset scans=photos/ --transform scans/images=resize:64 --split scans=0.2

  wsfed worker --port 0 --json        # any free port, told as one line of JSON

  wsfed worker --id alice --roster clinics.json --roster-owner 4b1e… --key alice.key \\
      --journal alice.journal

  wsfed worker --connect ws://127.0.0.1:8770 --id alice --tag digits   # through wsfed hub

  wsfed worker --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --token-file token.txt
"""

_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """``"8GB"``, ``"500M"``, ``"1048576"`` → bytes (powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a size; write 500MB, 8GB or a number of bytes")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def worker(
    id: Annotated[str, typer.Option(help="The worker's name.")] = "worker",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8777,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Offer a file (.npz .safetensors .csv .parquet .pt .txt), a folder of images, or "
            "what your own function gives (python:MODULE:FUNCTION, which is imported and run).",
        ),
    ] = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME/FIELD=TRANSFORM",
            help="Change a field while it is loaded, such as scans/images=scale:1/255.",
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FRACTION",
            help="Offer this fraction apart, as NAME-validation; ,seed=7 draws other rows.",
        ),
    ] = None,
    open: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Let rows of this data set be fetched."),
    ] = None,
    device: Annotated[str, typer.Option(help="Such as cpu, cuda:0, mps.")] = "cpu",
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Tensors of one session. Default: half of the memory."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch's threads. Default: torch's own choice.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Only clients that show the token in this file get in.")
    ] = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    insecure: Insecure = False,
    direct: Annotated[
        bool, typer.Option(help="Take tensors to other workers when a client asks for it.")
    ] = True,
    connect: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Do not listen, but be reached through this hub."),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="With --connect: clients look for nodes by tags."),
    ] = None,
    hub_token_file: Annotated[
        Path | None, typer.Option(help="With --connect: file with the token that the hub asks for.")
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="With --connect: certificates to trust (PEM), for wss://."),
    ] = None,
    roster: Annotated[
        Path | None, typer.Option(help="Take part in secure aggregation with these members.")
    ] = None,
    roster_owner: Annotated[
        str | None, typer.Option(metavar="KEY", help="Public key that has signed the roster.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="This worker's key (wsfed keygen).")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="File that notes the rounds it has taken part in.")
    ] = None,
    releases: Annotated[
        str | None,
        typer.Option(
            metavar="RULES",
            help="Let nothing leave but changes of a model with noise: clip=1,noise=1,budget=8.",
        ),
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="File that notes what releases have spent.")
    ] = None,
    cohort_moves: Annotated[
        int, typer.Option(min=0, help="Drop-outs and returns that it adds up across, an epoch.")
    ] = 8,
    alike_rows: Annotated[
        float, typer.Option(min=0, max=1, help="Share of a layer's rows that may be alike.")
    ] = 0.01,
    until_eof: UntilEof = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a worker node until it is interrupted or terminated.

    It binds 127.0.0.1 unless told otherwise, and prints its URL when it is ready.
    """
    set_up_log(verbose)
    # Only now: --help and mistakes should not wait for torch.
    from wsfed.node import check_exposure

    refusal = check_exposure(
        host, tls=tls_cert is not None, token=token_file is not None, insecure=insecure
    )
    if refusal:
        usage(refusal)
    if not id.strip():
        usage("--id needs a name")
    if connect is None and (tag or hub_token_file or tls_ca):
        usage("--tag, --hub-token-file and --tls-ca go with --connect")
    if connect is not None and (tls_cert or tls_key):
        usage("--connect dials and does not listen; --tls-cert and --tls-key are the hub's")
    membership = _membership(id, roster, roster_owner, key, journal, cohort_moves, alike_rows)
    strict = _ledger(releases, ledger)
    node = _node(
        id,
        _offered(dataset or [], transform or [], split or [], open or []),
        *(open or [], device, max_memory, threads, token_file, direct, membership, strict),
    )
    if connect is not None:
        secret = read_token(hub_token_file, "--hub-token-file") if hub_token_file else None
        trusted = _trusted(connect, tls_ca)
        dialling = node.enrol(connect, tags=tag or (), token=secret, ssl=trusted)
        try:
            idle = asyncio.run(_enrol(node, dialling, as_json, until_eof))
        except ValueError as error:
            usage(f"--connect: {error}")
    else:
        listening = node.listen(host, port, read_tls(tls_cert, tls_key))
        try:
            idle = asyncio.run(_serve(node, listening, as_json, until_eof))
        except OSError as error:
            cannot_listen(host, port, error)
    if not idle:
        # A kernel that has not come back by now would abort the interpreter's own shutdown.
        sys.stdout.flush()
        os._exit(0)


worker.__doc__ = inspect.cleandoc(worker.__doc__ or "") + "\n" + EXAMPLES


def _node(
    id: str,
    offered: list[_Offered],
    opened: list[str],
    device: str,
    max_memory: str | None,
    threads: int | None,
    token_file: Path | None,
    direct: bool,
    membership: Membership | None,
    ledger: Ledger | None,
) -> Node:
    import torch

    from wsfed.node import Node

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        usage(f"--device {device}: {str(error).splitlines()[0]}")
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = [part for each in offered for part in _loaded(each, opened, device)]
    token = read_token(token_file) if token_file else None
    size = parse_size(max_memory) if max_memory else None
    return Node(
        id,
        datasets=loaded,
        device=device,
        max_memory=size,
        token=token,
        direct=direct,
        membership=membership,
        ledger=ledger,
    )


@dataclass(frozen=True, slots=True)
class _Offered:
    """A data set as the options describe it."""

    name: str
    source: Path | Provider
    transforms: list[tuple[str, Transform]]
    #: Fraction and seed.
    split: tuple[float, int] | None


def _offered(
    datasets: list[str], transforms: list[str], splits: list[str], opened: list[str]
) -> list[_Offered]:
    from wsfed.worker.datasets import parse_option, parse_split
    from wsfed.worker.transforms import parse_transform

    try:
        named = [parse_option(text) for text in datasets]
        steps = [parse_transform(text) for text in transforms]
        parts = [parse_split(text) for text in splits]
    except ValueError as error:
        usage(str(error))
    names = [name for name, _ in named]
    for option, given in (("--transform", steps), ("--split", parts)):
        for name, *_ in given:
            if name not in names:
                usage(f"{option} {name}: there is no --dataset of that name")
    validation = [f"{name}-validation" for name, *_ in parts]
    names += validation
    if len(set(validation)) < len(validation):
        twice = max(validation, key=validation.count).removesuffix("-validation")
        usage(f"--split {twice}: it is given twice")
    if len(set(names)) < len(names):
        usage(f"--dataset {max(names, key=names.count)}: that name is given twice")
    unknown = set(opened) - set(names)
    if unknown:
        usage(f"--open {sorted(unknown)[0]}: there is no --dataset of that name")
    split = {name: (fraction, seed) for name, fraction, seed in parts}
    return [
        _Offered(
            name,
            source,
            [step for target, chain in steps if target == name for step in chain],
            split.get(name),
        )
        for name, source in named
    ]


def _loaded(offered: _Offered, opened: list[str], device: str) -> list[Dataset]:
    from wsfed.errors import DatasetError
    from wsfed.worker.datasets import load
    from wsfed.worker.providers import Provider

    if isinstance(offered.source, Provider) and os.getcwd() not in sys.path:
        # Last: nothing in this folder takes the place of an installed module.
        sys.path.append(os.getcwd())
    try:
        whole = load(offered.name, offered.source, transforms=offered.transforms, device=device)
        parts = [whole] if offered.split is None else [*whole.split(*offered.split)]
    except (DatasetError, OSError) as error:
        fail(str(error))
    return [replace(each, open=each.name in opened) for each in parts]


def _membership(
    id: str,
    roster: Path | None,
    owner: str | None,
    key: Path | None,
    journal: Path | None,
    moves: int,
    alike: float,
) -> Membership | None:
    if roster is None and owner is None and key is None and journal is None:
        return None
    if roster is None or owner is None or key is None or journal is None:
        usage("--roster, --roster-owner, --key and --journal go together")
    from wsfed.cli.roster import membership_of

    try:
        return membership_of(id, roster, owner, key, journal, moves, alike)
    except (OSError, ValueError) as error:
        fail(str(error))


def _ledger(rules: str | None, path: Path | None) -> Ledger | None:
    if rules is None:
        if path is not None:
            usage("--ledger goes with --releases")
        return None
    from wsfed.worker.strict import Ledger, parse_releases

    try:
        parsed = parse_releases(rules)
    except ValueError as error:
        usage(f"--releases {error}")
    if parsed.budget is None:
        typer.secho("wsfed worker: --releases without budget= ends never", fg="yellow", err=True)
    if parsed.budget is not None and path is None:
        usage("--releases with a budget needs --ledger, which outlives the worker")
    try:
        return Ledger(parsed, path)
    except ImportError:
        fail("a budget needs opacus: pip install 'wsfed[dp]'")
    except (OSError, ValueError) as error:
        fail(str(error))


def _trusted(url: str, ca: Path | None) -> ssl_module.SSLContext | None:
    """What to trust of a hub, whose URL is checked, too."""
    from wsfed.transport.websocket import check_url

    try:
        trusted = None if ca is None else ssl_module.create_default_context(cafile=ca)
        check_url(url, trusted)
    except OSError as error:
        fail(f"--tls-ca {ca}: {error.strerror or error}")
    except ValueError as error:
        usage(f"--connect: {error}")
    return trusted


async def _serve(
    node: Node, listening: AbstractAsyncContextManager[str], as_json: bool, until_eof: bool
) -> bool:
    stop = stopped(until_eof)
    _settle()
    async with node, listening as url:
        _tell(node, {"url": url}, f"on {url}", as_json)
        await stop.wait()
    return await node.join(0)


async def _enrol(
    node: Node, dialling: AbstractAsyncContextManager[Enrolment], as_json: bool, until_eof: bool
) -> bool:
    stop = stopped(until_eof)
    _settle()
    async with node, dialling as enrolment:
        await _one_of(stop, enrolment.failed, enrolment.enrolled)
        if enrolment.enrolled.is_set():
            _tell(node, {"hub": enrolment.url}, f"at the hub {enrolment.url}", as_json)
        await _one_of(stop, enrolment.failed)
    if enrolment.error is not None:
        fail(str(enrolment.error))
    return await node.join(0)


async def _one_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


def _settle() -> None:
    from wsfed.worker.memory import keep_memory

    keep_memory()
    # What is there by now stays, and commands come and go in numbers: looking through all of it
    # for cycles would take a tenth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _tell(node: Node, where: dict[str, str], words: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**where, **node.info}))
    else:
        rows = ", ".join(f"{name} ({d.rows} rows)" for name, d in node.datasets.items())
        typer.echo(f"worker {node.id} {words}" + (f" offers {rows}" if rows else ""))
    sys.stdout.flush()
