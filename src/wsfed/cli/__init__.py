"""The command line: ``wsfed worker``, ``hub``, ``status``, ``train``, ``simulate`` and others.

Exit codes: 0 success, 1 it did not work (the reason is on stderr), 2 wrong usage.
"""

from __future__ import annotations

from typing import Annotated

import typer

import wsfed
from wsfed.cli.demo import demo
from wsfed.cli.hub import hub
from wsfed.cli.roster import keygen, roster
from wsfed.cli.status import status
from wsfed.cli.train import simulate, train
from wsfed.cli.worker import worker

__all__ = ["app", "main"]

app = typer.Typer(
    help="PyTorch on other people's machines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wsfed {wsfed.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command()(worker)
app.command()(hub)
app.command()(status)
app.command()(demo)
app.command()(train)
app.command()(simulate)
app.command()(keygen)
app.command()(roster)


def main() -> None:
    """Run the command line."""
    app()
