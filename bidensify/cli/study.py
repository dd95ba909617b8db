"""``compare`` and ``demo``: runs side by side, and the whole of bidensify in one job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bidensify.cli.app import Debug, command, output
from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from bidensify.compare import Table


def as_rich(table: Table) -> RichTable:
    """Turns a report's table into one for the terminal."""
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown


@command(
    "compare",
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
        Path | None, typer.Option("--out", "-o", help="Also write a report page (HTML).", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Put finished runs side by side: a table, and with --out a page with their learning curves."""
    from bidensify.compare import comparison, read_run, write_report
    from bidensify.compare.runs import metrics_table

    places = [folder.resolve() for folder in runs]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(f"{str(runs[number])!r} is given twice; give each run once")
    records = [read_run(folder) for folder in runs]
    output().print(as_rich(metrics_table(records)))
    if out is not None:
        write_report(comparison(records), out)
        output().print(f"Report: {out}", highlight=False)


@command("demo", "bidensify demo", "bidensify demo --out runs/demo --seed 1", "bidensify demo --out runs/quick --quick")
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Folder for everything.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, weights and training.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes: shows that it runs, not how good it is.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a teacher on generated scenes, binarize it with two methods, distil, pack, reload, compare, report.

    Needs no download and about six minutes on two cores. A run that was stopped goes on where it was.
    Ends with exit code 1 if a check fails.
    """
    from bidensify.demo.job import run_demo

    results = run_demo(out, seed=seed, quick=quick, console=output())
    if not results["passed"]:
        raise typer.Exit(1)
