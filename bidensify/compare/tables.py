"""A table as text: for a terminal, a README, a paper, a spreadsheet."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from bidensify.compare.report import Table

__all__ = ["to_csv", "to_latex", "to_markdown", "to_rich"]

_LATEX = {
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "×": r"$\times$", "–": "--", "→": r"$\to$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
}  # fmt: skip


def to_rich(table: Table) -> RichTable:
    """Returns the table for a terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for at, row in enumerate(table.rows):
        shown.add_row(
            *(Text(cell, style="bold" if (at, number) in table.strong else "") for number, cell in enumerate(row))
        )
    return shown


def to_markdown(table: Table) -> str:
    """Returns the table as Markdown, the strong cells bold."""
    rows = [
        [f"**{cell}**" if (at, number) in table.strong else cell for number, cell in enumerate(map(_cell, row))]
        for at, row in enumerate(table.rows)
    ]
    lines = [list(map(_cell, table.columns)), ["---", *["---:"] * (len(table.columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (f"\n{table.note}\n" if table.note else "")


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def to_latex(table: Table) -> str:
    """Returns the table as a ``tabular`` for the package booktabs, the strong cells bold."""

    def text(cell: str, strong: bool = False) -> str:
        escaped = "".join(_LATEX.get(letter, letter) for letter in cell)
        return rf"\textbf{{{escaped}}}" if strong else escaped

    lines = [rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(text, table.columns)) + r" \\", r"\midrule"]
    lines += [
        " & ".join(text(cell, (at, number) in table.strong) for number, cell in enumerate(row)) + r" \\"
        for at, row in enumerate(table.rows)
    ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def to_csv(table: Table) -> str:
    """Returns the table as CSV; a cell that a spreadsheet would run as a formula is led by an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in (table.columns, *table.rows):
        writer.writerow([f"'{cell}" if cell[:1] in ("=", "+", "@", "\t", "\r") else cell for cell in row])
    return buffer.getvalue()
