"""``compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bidensify._util.terminal import console
from bidensify.cli.command import command
from bidensify.cli.options import Debug
from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from bidensify.compare import Table


def as_rich(table: Table) -> RichTable:
    """Turns a report's table into one for the terminal."""
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown


@command(
    "bidensify compare runs/bidense runs/bnn",
    "bidensify compare runs/scenes_teacher runs/bidense runs/bnn --out comparison.html",
)
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", exists=True, file_okay=False, help="Folders of finished runs.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write a report page (*.html).", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Put finished runs side by side: a table, and with --out a page with their learning curves."""
    from bidensify.compare import comparison, read_run, write_report
    from bidensify.compare.runs import metrics_table

    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {str(out)!r}: the report is a page, its name must end in .html")
    places = [folder.resolve() for folder in runs]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(f"{str(runs[number])!r} is given twice; give each run once")
    records = [read_run(folder) for folder in runs]
    console().print(as_rich(metrics_table(records)))
    if out is not None:
        write_report(comparison(records), out)
        console().print(f"Report: {out}", soft_wrap=True)
