"""``compare``: runs side by side, or methods under one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bidensify._util.terminal import console
from bidensify.cli.command import command
from bidensify.cli.options import Debug, Set
from bidensify.errors import ConfigError


@command(
    "bidensify compare runs/bidense runs/bnn",
    "bidensify compare runs/scenes_teacher runs/bidense runs/bnn --out comparison.html",
    "bidensify compare recipes/scenes_segmentation.yaml --methods bidense,bnn --seeds 0,1,2 --out runs/methods",
    "bidensify compare recipes/scenes_segmentation.yaml --methods bidense,bnn --own bnn:stages[1].lr=2e-3 --out runs/methods",
)
def compare(
    what: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE | RUN...", exists=True, help="One recipe, or folders of finished runs.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Of runs: also write a page (*.html). Of a recipe: the comparison's folder.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="The methods to compare.", show_default="all")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,...", help="A run of each method under each seed.")] = "0",
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher", "-t", exists=True, help="A teacher's run folder; else it is trained.", show_default=False
        ),
    ] = None,
    settings: Set = None,
    own: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD:PATH=VALUE", help="Change the recipe for one method; repeat for more."),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", "-j", min=0, help="Runs at a time, each in its own process; 0: measure what is finished."
        ),
    ] = 1,
    pictures: Annotated[int, typer.Option(min=0, help="Images in the report's viewer.")] = 6,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing, all networks together; 0: no times.")] = 5.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the timed networks.", show_default="all")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress of training.")] = False,
    debug: Debug = False,
) -> None:
    """Put finished runs side by side, or train every method under one recipe and compare them.

    With runs: a table, and with --out a page with their learning curves. With a recipe: the teacher is trained once, then each
    method under each seed. The folder gets results.json, tables, plots and report.html; the same command goes on with what was
    stopped, and a run that fails does not end the others (exit code 1 then).
    """
    if all(place.is_dir() for place in what):
        given = {"--methods": methods, "--teacher": teacher, "--set": settings, "--own": own}
        for name in (name for name, value in given.items() if value):
            raise ConfigError(
                f"{name} is for comparing methods under a recipe; {str(what[0])!r} is a folder of a finished run"
            )
        compare_runs(what, out)
        return
    if len(what) > 1:
        raise ConfigError(f"{', '.join(map(str, what))}: give one recipe, or folders of finished runs")
    if out is None:
        raise ConfigError("comparing methods needs a folder for its runs and results: give --out FOLDER")
    compare_methods(
        what[0], out, methods, seeds, teacher, settings or [], own or [], jobs, pictures, seconds, threads, quiet
    )


def compare_runs(runs: list[Path], out: Path | None) -> None:
    """Prints the table of finished runs, and writes their page."""
    from bidensify.compare import comparison, read_run, write_report
    from bidensify.compare.runs import how_they_differ, metrics_table
    from bidensify.compare.tables import to_rich

    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {str(out)!r}: the report is a page, its name must end in .html")
    places = [folder.resolve() for folder in runs]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ConfigError(f"{str(runs[number])!r} is given twice; give each run once")
    records = [read_run(folder) for folder in runs]
    screen = console()
    screen.print(to_rich(metrics_table(records)))
    screen.print(how_they_differ(records), soft_wrap=True)
    if out is not None:
        write_report(comparison(records), out)
        screen.print(f"Report: {out}", soft_wrap=True)


def compare_methods(
    recipe: Path,
    out: Path,
    methods: str | None,
    seeds: str,
    teacher: Path | None,
    settings: list[str],
    own: list[str],
    jobs: int,
    pictures: int,
    seconds: float,
    threads: int | None,
    quiet: bool,
) -> None:
    """Runs a comparison of methods, prints its table, and ends with exit code 1 where a run failed."""
    from bidensify.compare.matrix import Matrix
    from bidensify.compare.page import main_table
    from bidensify.compare.study import run_comparison
    from bidensify.compare.tables import to_rich
    from bidensify.methods import available_methods, get_method
    from bidensify.recipe import load_recipe

    loaded = load_recipe(recipe, settings)
    every = [name for name in available_methods() if get_method(name).takes("conv2d")]
    names = listed(methods, "--methods") if methods is not None else every
    try:
        numbers = [int(text) for text in listed(seeds, "--seeds")]
    except ValueError:
        raise ConfigError(f"--seeds {seeds!r}: give whole numbers with commas between, for example 0,1,2") from None
    matrix = Matrix(loaded, names, numbers, out, own_settings(own), teacher)
    screen = console()
    results = run_comparison(
        matrix,
        jobs=jobs,
        pictures=pictures,
        seconds=seconds,
        threads=threads,
        quiet=quiet,
        say=lambda text: screen.print(text, soft_wrap=True),
    )
    screen.print(to_rich(main_table(results)))
    screen.print(f"Results: {out / 'results.json'}\nReport: {out / 'report.html'}", soft_wrap=True)
    if any(cell.state == "failed" for cell in results.cells):
        raise typer.Exit(1)


def listed(text: str, option: str) -> list[str]:
    """Reads ``"a,b"`` as ["a", "b"].

    Raises:
        ConfigError: nothing between two commas.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{option} {text!r}: give names with commas between, for example a,b")
    return parts


def own_settings(texts: list[str]) -> dict[str, list[str]]:
    """Reads ``["bnn:stages[0].lr=1e-3"]`` as {"bnn": ["stages[0].lr=1e-3"]}.

    Raises:
        ConfigError: another form.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        method, colon, change = text.partition(":")
        if not (method and colon and "=" in change):
            raise ConfigError(f"--own {text!r} is not METHOD:PATH=VALUE, for example bnn:stages[0].lr=1e-3")
        found.setdefault(method, []).append(change)
    return found
