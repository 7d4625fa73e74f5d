"""``wsfed train`` and ``wsfed simulate``: federated training as a TOML file says."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from torch import nn

    from wsfed.cli.config import Configuration
    from wsfed.federated import History

__all__ = ["simulate", "train"]

EXAMPLES = """
Examples:

  wsfed train digits.toml

  wsfed train digits.toml --resume
"""


def train(
    config: Annotated[
        Path, typer.Argument(metavar="FILE", help="TOML file; docs/train.md says what it holds.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a model over the workers that a file names.

    Writes the model, metrics (CSV), a plot and checkpoints to its output folder.
    """
    _run(config, resume, quiet, _workers)


train.__doc__ = inspect.cleandoc(train.__doc__ or "") + "\n" + EXAMPLES


def simulate(
    config: Annotated[
        Path, typer.Argument(metavar="FILE", help="TOML file with a [simulation] table.")
    ],
    clients: Annotated[
        int | None, typer.Option(min=1, help="In place of the file's number of clients.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Workers on a Ray cluster: local starts one here, HOST:PORT is one that this "
            "machine is part of.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, help="How many. Default: one for each CPU of the cluster.")
    ] = None,
) -> None:
    """Train as train does, over virtual clients in this process or on a Ray cluster.

    Rows of one file are cut into the clients' parts; each is a data set of its own on a worker in
    this process. What is held out is evaluated after each round.

    Examples:

      wsfed simulate digits.toml --clients 1000

      wsfed simulate digits.toml --ray local
    """
    if ray is None and ray_workers is not None:
        raise typer.BadParameter("--ray-workers goes with --ray")
    _run(config, resume, quiet, partial(_virtual, clients, ray, ray_workers))


def _run(config: Path, resume: bool, quiet: bool, opened: Callable[..., Any]) -> None:
    from rich.console import Console

    console = Console()
    try:
        from wsfed.cli.config import load_configuration
    except ImportError as error:
        _fail(f"{error.name} is not installed: pip install 'wsfed[train]'")
    from wsfed.errors import WsfedError

    try:
        settings = load_configuration(config)
        history = asyncio.run(_train(settings, config.parent, resume, quiet, opened, console))
    except WsfedError as error:
        _fail(str(error), getattr(error, "history", None))
    except (RuntimeError, TypeError, ValueError) as error:
        _fail(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        _fail("interrupted; --resume goes on from the last checkpoint", code=130)
    console.print(history)
    if history.stopped:
        console.print(f"ended early: {history.stopped}")


async def _train(
    settings: Configuration,
    base: Path,
    resume: bool,
    quiet: bool,
    opened: Callable[..., Any],
    console: Any,
) -> History:
    from wsfed import federated

    folder = base / settings.output.folder
    model = await asyncio.to_thread(settings.make_model, base)
    arguments = await asyncio.to_thread(settings.arguments, base)
    callbacks = _callbacks(settings, folder, quiet, console)
    async with AsyncExitStack() as stack:
        for each in callbacks:
            if hasattr(each, "__exit__"):
                stack.enter_context(each)
        workers, more = await stack.enter_async_context(opened(settings, base, model))
        history = await federated.fit(
            model,
            workers,
            **{**arguments, **more},
            callbacks=callbacks,
            checkpoint=federated.Checkpoint(
                folder / "checkpoints", every=settings.output.checkpoint_every
            ),
            resume=resume,
        )
    await asyncio.to_thread(_write, model, history, folder)
    console.print(f"model, metrics, plot: {folder}", soft_wrap=True)
    return history


def _write(model: nn.Module, history: History, folder: Path) -> None:
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / "model.safetensors"))
    history.to_csv(folder / "history.csv")
    history.plot(folder / "history.png")


def _callbacks(settings: Configuration, folder: Path, quiet: bool, console: Any) -> list[Any]:
    from wsfed import federated
    from wsfed.cli.progress import Bar, Boards, Lines
    from wsfed.errors import FederatedError

    made: list[Any] = [Lines(folder)]
    if not quiet:
        made.append(Bar(console, settings.training.rounds))
    if settings.training.patience is not None:
        made.append(federated.EarlyStopping("loss", patience=settings.training.patience))
    if settings.output.tensorboard:
        try:
            made.append(Boards(folder / "tensorboard"))
        except ImportError:
            raise FederatedError(
                "[output] tensorboard is not installed: pip install 'wsfed[tensorboard]'"
            ) from None
    return made


# --- workers --------------------------------------------------------------------------------------


@asynccontextmanager
async def _workers(
    settings: Configuration, base: Path, model: nn.Module
) -> AsyncIterator[tuple[Sequence[Any], dict[str, Any]]]:
    """The workers that the file names, as what opens connections."""
    import wsfed
    from wsfed.errors import FederatedError

    section = settings.workers
    urls = list(section.urls)
    token = hub_token = None
    try:
        if section.file is not None:
            told = json.loads((base / section.file).read_text())
            urls += [each["url"] for each in told["workers"]]
        if section.token_file is not None:
            token = (base / section.token_file).read_text().strip()
        if section.hub_token_file is not None:
            hub_token = (base / section.hub_token_file).read_text().strip()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FederatedError(f"[workers] {error}") from None
    openers = [partial(wsfed.connect, url, token=token) for url in urls]
    if section.hub is None:
        if not urls:
            raise FederatedError(
                "[workers] there are no urls, no file of scripts/start_workers.py and no hub"
            )
        yield openers, {}
        return
    async with wsfed.hub(section.hub, token=hub_token) as hub:
        there = await hub.wait_for_nodes(section.wait_for, section.tags, timeout=section.timeout)
        names = sorted(node.id for node in there)
        yield [*openers, *(partial(hub.worker, name, token=token) for name in names)], {}


@asynccontextmanager
async def _virtual(
    clients: int | None,
    ray: str | None,
    ray_workers: int | None,
    settings: Configuration,
    base: Path,
    model: nn.Module,
) -> AsyncIterator[tuple[Sequence[Any], dict[str, Any]]]:
    """A data set for each client, on one worker in this process or on several of a Ray cluster."""
    import wsfed
    from wsfed.cli.simulation import cut
    from wsfed.errors import FederatedError

    if settings.simulation is None:
        raise FederatedError("[simulation] says which rows are cut into how many clients' parts")
    parts, evaluate = await asyncio.to_thread(cut, settings, base, clients)
    more: dict[str, Any] = {"dataset": "client-*", "validation": None, "evaluate": evaluate}
    if ray is not None:
        from wsfed.cli.cluster import hosted

        async with hosted(parts, ray, ray_workers) as openers:
            yield openers, more
        return
    async with wsfed.VirtualWorker("simulation", datasets=parts) as worker:
        yield [worker], more


def _fail(text: str, history: History | None = None, code: int = 1) -> NoReturn:
    if history is not None and len(history):
        typer.echo(repr(history), err=True)
    typer.secho(f"wsfed: {text}", fg="red", err=True)
    raise typer.Exit(code)
