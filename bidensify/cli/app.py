"""The application: its commands by name, and the entry point.

Exit codes: 0 done, 1 failed (a message on standard error, or a check that did not pass), 2 wrong use (an unknown option, a
missing argument, a path that is not there, a name or a value that cannot be taken), 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from bidensify._util.version import __version__
from bidensify.cli.bench import bench
from bidensify.cli.budgets.allocate import allocate
from bidensify.cli.budgets.calibrate import calibrate
from bidensify.cli.budgets.sensitivity import sensitivity
from bidensify.cli.compare import compare
from bidensify.cli.demo import demo
from bidensify.cli.deploy import export, pack, runtime
from bidensify.cli.evaluate import evaluate
from bidensify.cli.models import convert, plan, summary
from bidensify.cli.predict import predict
from bidensify.cli.runs import check, finetune

__all__ = ["COMMANDS", "app", "main"]

COMMANDS = (
    plan, summary, convert, check, finetune, evaluate, predict, sensitivity, allocate, calibrate, compare, pack, bench, export,
    runtime, demo,
)  # fmt: skip

app = typer.Typer(
    name="bidensify",
    help="Turns existing PyTorch dense-prediction networks into 1-bit networks: rewrite, distil, pack.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in COMMANDS:
    # typer's epilog keeps only line breaks that are paragraph breaks.
    _lines = ("[bold]Examples[/bold]", *(f"  [cyan]{escape(line)}[/cyan]" for line in _command.examples))
    app.command(_command.__name__, epilog="\n\n".join(_lines))(_command)


def version_option(value: bool) -> None:
    """Prints the version and ends, when ``--version`` is given."""
    if value:
        print(f"bidensify {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=version_option, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turns existing PyTorch dense-prediction networks into 1-bit networks: rewrite, distil, pack."""


def main() -> None:
    """Entry point of the ``bidensify`` script."""
    try:
        app()
    except BrokenPipeError:
        # The reader of a pipe (`| head`) left; that is no failure worth a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
