"""A whole comparison: the matrix of runs, what their networks cost and hold, tables, plots and the report page."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bidensify._util.files import atomic_write
from bidensify._util.machine import cpu_name
from bidensify._util.version import __version__
from bidensify.compare.entropy import first_binarization
from bidensify.compare.matrix import Matrix
from bidensify.compare.measure import Network, binary_networks, float_networks, timed
from bidensify.compare.page import class_table, main_table, plots, report
from bidensify.compare.pictures import sheet, shots
from bidensify.compare.report import Shot, write_report
from bidensify.compare.results import Cell, Results
from bidensify.compare.tables import to_csv, to_latex, to_markdown

if TYPE_CHECKING:
    from bidensify.data import DenseDataset
    from bidensify.tasks import Task

__all__ = ["run_comparison"]

_ENTROPY_IMAGES = 32


def run_comparison(
    matrix: Matrix,
    *,
    jobs: int = 1,
    pictures: int = 6,
    seconds: float = 5.0,
    threads: int | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> Results:
    """Runs what is not finished of a matrix, measures the networks, and writes everything into ``matrix.out``.

    ``results.json`` is there from the first finished cell on and is whole at any time; a comparison that was stopped goes on
    where it was. Beside it: ``tables/`` (Markdown, LaTeX, CSV), ``plots/`` (PNG, SVG) and ``report.html``.

    Args:
        matrix: recipe, methods, seeds, folder.
        jobs: runs at a time, each in a process of its own where there are several; 0 measures what is finished, trains nothing.
        pictures: images in the viewer.
        seconds: of timing, all networks together; 0 leaves times out.
        threads: of the timed networks; by default PyTorch's number.
        quiet: print nothing while training.
        say: told what happens.

    Returns:
        The results.

    Raises:
        ConfigError: the folder holds something else.
    """
    matrix.claim()
    recipe = matrix.recipe
    val = recipe.build_dataset("val")
    task = recipe.build_task(val.info)
    cells = {(m, s): matrix.open_cell(m, s) for m in matrix.methods for s in matrix.seeds}
    number = threads or torch.get_num_threads()
    results = Results(
        name=recipe.name,
        task=task.name,
        primary=task.primary,
        higher_is_better=task.higher_is_better,
        classes=list(getattr(task, "class_names", ())),
        recipe=recipe.to_dict(),
        size=recipe.image_size,
        methods=list(matrix.methods),
        seeds=list(matrix.seeds),
        cells=list(cells.values()),
        machine={
            "processor": cpu_name(),
            "threads": str(number),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bidensify": __version__,
        },
    )
    file = matrix.out / "results.json"
    if jobs:
        matrix.train_teacher(say, quiet)
    for cell in matrix.run(jobs=jobs, say=say, quiet=quiet):
        cells[cell.method, cell.seed] = cell
        results = results.model_copy(update={"cells": list(cells.values())})
        results.write(file)
    networks = _measure(matrix, results.cells, task, val, seconds, number, say)
    entropy = _entropy(networks, val)
    floats = next((network.point.metrics for network in networks if network.point.name == "float"), {})
    points = [network.point for network in networks]
    results = results.model_copy(update={"points": points, "entropy": entropy, "teacher": floats})
    results.write(file)
    normalisation = (recipe.data.mean or val.info.mean, recipe.data.std or val.info.std)
    models = {network.point.name: network.model.eval() for network in networks}
    write_files(matrix.out, results, shots(task, val, models, pictures, normalisation), _legend(task))
    return results


def _measure(
    matrix: Matrix,
    cells: Sequence[Cell],
    task: Task,
    val: DenseDataset,
    seconds: float,
    threads: int,
    say: Callable[[str], None],
) -> list[Network]:
    x = val[0]["image"][None].as_subclass(torch.Tensor)
    networks = [*float_networks(matrix, task, val, threads, say), *binary_networks(matrix, list(cells), x)]
    if seconds > 0:
        say(f"timing {len(networks)} networks")
        timed(networks, x, seconds, threads)
    return networks


def _entropy(networks: Sequence[Network], val: DenseDataset) -> dict[str, object]:
    images = [val[index]["image"][None].as_subclass(torch.Tensor) for index in range(min(len(val), _ENTROPY_IMAGES))]
    return {
        network.point.name: first_binarization(network.latent.eval(), images)
        for network in networks
        if network.latent is not None
    }


def _legend(task: Task) -> list[tuple[str, str]]:
    names, palette = getattr(task, "class_names", ()), getattr(task, "palette", ())
    return [(name, f"rgb({colour[0]}, {colour[1]}, {colour[2]})") for name, colour in zip(names, palette)]


def write_files(out: Path, results: Results, shown: Sequence[Shot], legend: Sequence[tuple[str, str]]) -> None:
    """Writes ``tables/``, ``plots/`` and ``report.html`` of a comparison."""
    drawn = plots(results)
    for name, figure in drawn.items():
        for suffix, data in (("png", figure.light), ("svg", figure.svg)):
            with atomic_write(out / "plots" / f"{name}.{suffix}") as temporary:
                temporary.write_bytes(data)
    if shown:
        with atomic_write(out / "plots" / "pictures.png") as temporary:
            temporary.write_bytes(sheet(shown))
    for name, table in (("results", main_table(results)), ("classes", class_table(results))):
        for suffix, form in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
            if table is not None:
                with atomic_write(out / "tables" / f"{name}.{suffix}") as temporary:
                    temporary.write_text(form(table), encoding="utf-8")
    write_report(report(results, shown, legend, drawn), out / "report.html")
