"""The one place where text is made for the terminal: names that users gave are shown as they are, never as markup."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["as_text", "console", "off_standard_output", "shell"]

_UNFOLDED = 100_000


def console(*, stderr: bool = False) -> Console:
    """Returns a console on standard output or standard error (made at each call: tests and pipes exchange the streams).

    Square brackets and ``:names:`` mean themselves. What goes to a file or a pipe is not folded, unless ``COLUMNS`` says
    how wide it is: a path that is cut in two is no path.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _UNFOLDED
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def shell(*words: object) -> str:
    """Returns a command that can be pasted into a shell, each word quoted where it has to be."""
    return shlex.join(str(word) for word in words)


def as_text(table: Table) -> str:
    """Returns ``table`` as text without colour, as wide as the terminal, or as wide as it needs where there is none."""
    from rich.console import Console

    width = shutil.get_terminal_size((_UNFOLDED, 24)).columns
    console = Console(width=width, no_color=True, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@contextlib.contextmanager
def off_standard_output(*, drop: bool = False) -> Iterator[None]:
    """What other packages write to standard output meanwhile, from C++ too, goes to standard error: JSON stands there alone.

    Args:
        drop: it goes nowhere.
    """
    with contextlib.ExitStack() as stack:
        error = stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if drop else sys.stderr
        sys.stdout.flush()
        stack.enter_context(contextlib.redirect_stdout(error))
        # Streams of a test or a notebook have no file below them, and a service may have closed its own.
        with contextlib.suppress(OSError):
            target, kept = error.fileno(), os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            flush_c = ctypes.CDLL(None).fflush
            stack.callback(flush_c, None)
            flush_c(None)
            os.dup2(target, 1)
        yield
