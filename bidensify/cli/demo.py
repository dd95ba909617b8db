"""``demo``: the whole of bidensify in one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bidensify._util.terminal import console
from bidensify.cli.command import command
from bidensify.cli.options import Debug


@command("bidensify demo", "bidensify demo --out runs/demo --seed 1", "bidensify demo --out runs/quick --quick")
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

    results = run_demo(out, seed=seed, quick=quick, console=console())
    if not results["passed"]:
        raise typer.Exit(1)
