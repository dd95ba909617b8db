"""Tables as plain text, for ``print``."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def as_text(table: Table) -> str:
    """Returns ``table`` as text without colour, as wide as the terminal, or as wide as it needs where there is none."""
    from rich.console import Console

    console = Console(width=shutil.get_terminal_size((100_000, 24)).columns, no_color=True, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
