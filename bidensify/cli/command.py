"""What makes a function a command: its errors are shown, and its examples end its ``--help``."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import Any, Protocol

import typer

from bidensify._util.terminal import console
from bidensify.errors import BidensifyError, ConfigError

__all__ = ["Command", "command"]

WRONG_USE = 2
STOPPED = 130
_WHAT_TO_DO = {
    errno.ENOSPC: "; make room and try again: files that are there are whole, what was being written is not there",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; give a place that you may write to"),
}


class Command(Protocol):
    """A function that the application registers under its own name."""

    __name__: str
    examples: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command."""


def command(*examples: str) -> Callable[[Callable[..., Any]], Command]:
    """Makes a function a command of the application.

    A :class:`BidensifyError`, or an error of the file system, becomes one message on standard error and an exit code: 2
    for a :class:`ConfigError` (what was asked for cannot be), else 1; with ``--debug`` it is raised. Ctrl-C ends with 130,
    as in a shell.
    """
    if not examples:
        raise ValueError("a command needs an example; --help of each command shows at least one")

    def make(function: Callable[..., Any]) -> Command:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except BrokenPipeError:
                raise
            except (BidensifyError, OSError) as error:
                if kwargs.get("debug") or os.environ.get("BIDENSIFY_DEBUG"):
                    raise
                _show(error)
                raise typer.Exit(WRONG_USE if isinstance(error, ConfigError) else 1) from None
            except KeyboardInterrupt:
                console(stderr=True).print("Stopped.")
                raise typer.Exit(STOPPED) from None

        guarded.examples = examples  # type: ignore[attr-defined]
        return guarded  # type: ignore[return-value]

    return make


def _show(error: BidensifyError | OSError) -> None:
    """Prints ``error`` on standard error: a panel on a terminal, a line where nobody looks at a frame."""
    from rich.panel import Panel
    from rich.text import Text

    kind, text = type(error).__name__, str(error)
    if isinstance(error, OSError) and not isinstance(error, BidensifyError) and error.strerror:
        place = f"{str(error.filename)!r}: " if error.filename is not None else ""
        text = f"{place}{error.strerror}{_WHAT_TO_DO.get(error.errno or 0, '')}"
    target = console(stderr=True)
    if not target.is_terminal:
        target.print(f"{kind}: {text}", soft_wrap=True)
        return
    target.print(Panel(Text(text), title=Text(kind, style="bold red"), border_style="red", title_align="left"))
