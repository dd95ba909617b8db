"""The application object, its exit codes and how errors are shown.

Exit codes: 0 done, 1 failed (a :class:`~bidensify.errors.BidensifyError` in one panel, or a check that did not pass),
2 wrong use (unknown option, missing argument, a path that is not there), 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from bidensify.errors import BidensifyError

Function = TypeVar("Function", bound=Callable[..., Any])

app = typer.Typer(
    name="bidensify",
    help="Turns existing PyTorch dense-prediction networks into 1-bit networks: rewrite, distil, pack.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def output() -> Console:
    """Returns a console on standard output (made at each call: tests and pipes exchange ``sys.stdout``)."""
    return Console(soft_wrap=False)


def command(name: str, *examples: str) -> Callable[[Function], Function]:
    """Registers a function as sub-command ``name``; ``examples`` end its ``--help``.

    A :class:`BidensifyError`, or an error of the file system, becomes one panel on standard error and exit code 1; with
    ``--debug`` it is raised. Ctrl-C ends with exit code 130, as in a shell.
    """
    if not examples:
        raise ValueError(f"command {name!r} has no example; --help of each command shows at least one")
    # typer's epilog keeps only line breaks that are paragraph breaks.
    epilog = "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]{escape(line)}[/cyan]" for line in examples)])

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except BrokenPipeError:
                raise
            except (BidensifyError, OSError) as error:
                if kwargs.get("debug") or os.environ.get("BIDENSIFY_DEBUG"):
                    raise
                show_error(error)
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                Console(stderr=True).print("Stopped.")
                raise typer.Exit(130) from None

        app.command(name, epilog=epilog)(guarded)
        return function

    return register


_WHAT_TO_DO = {
    errno.ENOSPC: "; make room and try again: files that are there are whole, what was being written is not there",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; give a place that you may write to"),
}


def show_error(error: BidensifyError | OSError) -> None:
    """Prints ``error`` as one panel on standard error."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, OSError) and not isinstance(error, BidensifyError) and error.strerror:
        place = f"{str(error.filename)!r}: " if error.filename is not None else ""
        text = f"{place}{error.strerror}{_WHAT_TO_DO.get(error.errno or 0, '')}"
    Console(stderr=True).print(
        Panel(escape(text), title=f"[bold red]{kind}[/bold red]", border_style="red", title_align="left")
    )


def version_option(value: bool) -> None:
    """Prints the version and ends, when ``--version`` is given."""
    if value:
        from bidensify import __version__

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
    # Imported here so that `app` exists before the modules that register on it.
    from bidensify.cli import bench, deploy, models, runs, study  # noqa: F401

    try:
        app()
    except BrokenPipeError:
        # The reader of a pipe (`| head`) left; that is no failure worth a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
