"""results.json: what is written is read, other files are refused, and means are those of the finished seeds."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from bidensify.compare.page import class_table, main_table, plots, report
from bidensify.compare.plots import Bars, bars
from bidensify.compare.report import render
from bidensify.compare.results import Cell, Entropy, Point, Results
from bidensify.errors import FormatError


def example(primary: str = "miou", **changes: object) -> Results:
    def cell(method: str, seed: int, value: float, state: str = "done") -> Cell:
        history = [{"epoch": e, "loss": 1 / e, primary: value * e / 2} for e in (1, 2)]
        metrics = {primary: value, "iou/road": value / 2, "iou/sky": value}
        folder = f"runs/{method}/seed{seed}"
        if state == "failed":
            return Cell(method=method, seed=seed, folder=folder, state="failed", error="TrainingError: <b>nan</b>")
        return Cell(
            method=method,
            seed=seed,
            folder=folder,
            state="done",
            metrics=metrics,
            history=history,
            seconds_per_step=0.5,
        )

    values: dict[str, object] = {
        "name": "example",
        "task": "segmentation",
        "primary": primary,
        "higher_is_better": primary == "miou",
        "classes": ["sky", "road"],
        "recipe": {"name": "example"},
        "size": (32, 48),
        "methods": ["bnn", "bidense", "gone"],
        "seeds": [0, 1],
        "cells": [cell("bnn", 0, 0.25), cell("bnn", 1, 0.35), cell("bidense", 0, 0.5), cell("bidense", 1, 0, "failed")],
        "points": [
            Point(name="float", kind="float", metrics={primary: 0.6}, ops=2e9, bytes=4_000_000, milliseconds=10.0),
            Point(name="int8", kind="float", metrics={primary: 0.55}, bytes=1_000_000, milliseconds=3.0),
            Point(name="bidense", kind="binary", ops=1e8, bytes=200_000, milliseconds=2.0),
            Point(name="bnn", kind="binary", ops=1e8, note="not packed: its scale is spatial"),
        ],
        "entropy": {"bidense": Entropy(layer="0", before=[7.0, 6.0], after=[1.0, 0.5])},
        **changes,
    }
    return Results.model_validate(values)


def test_round_trip(tmp_path: Path) -> None:
    results = example()
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["version"] == 1
    for change in ({"version": 2}, {"cells": "none"}, {"more": 1}):
        (tmp_path / "other.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(FormatError, match="is no results file of version 1"):
            Results.read(tmp_path / "other.json")


def test_means_deviations_and_order() -> None:
    results = example()
    assert results.spread("bnn", "miou") == (pytest.approx(0.3), pytest.approx(statistics.stdev([0.25, 0.35])), 2)
    assert results.spread("bidense", "miou") == (0.5, 0.0, 1)
    assert results.spread("gone", "miou") is None
    assert results.ranked() == ["bidense", "bnn", "gone"]
    assert example("absrel").ranked() == ["bnn", "bidense", "gone"]


def test_the_main_table() -> None:
    table = main_table(example())
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["float", "int8", "bidense", "bnn", "gone"]
    assert rows["bnn"]["miou %"] == "30.00 ± 7.07"
    assert rows["bidense"]["miou %"] == "50.00"
    assert rows["bidense"]["seeds"] == "1 of 2"
    assert rows["bidense"]["smaller"] == "20.0×"
    assert rows["bidense"]["GOPs"] == "0.100"
    assert rows["bnn"]["ms / image"] == "–"
    assert rows["int8"]["GOPs"] == "–"
    assert rows["gone"]["miou %"] == "–"
    assert table.strong == {(2, 1)}
    assert "bnn: not packed: its scale is spatial" in table.note
    assert "bidense, seed 1: failed" in table.note
    classes = class_table(example())
    assert classes is not None
    assert [row[0] for row in classes.rows] == ["sky", "road"]
    assert dict(zip(classes.columns, classes.rows[1], strict=True))["bnn"] == "15.00 ± 3.54"


def test_of_a_metric_of_ones_own_nobody_says_which_end_is_better() -> None:
    results = example()
    cells = [
        cell.model_copy(update={"metrics": {**cell.metrics, "hausdorff": 3.0 + n}})
        for n, cell in enumerate(results.cells)
    ]
    assert main_table(results.model_copy(update={"cells": cells})).strong == {(2, 1)}
    column = main_table(results.model_copy(update={"cells": cells})).columns.index("hausdorff")
    first = results.model_copy(update={"cells": cells, "primary": "hausdorff", "higher_is_better": False})
    assert column > 1
    assert (main_table(first).columns[1], [at for _, at in main_table(first).strong].count(1)) == ("hausdorff", 1)


def test_what_is_no_number_reads_back(tmp_path: Path) -> None:
    results = example()
    point = results.points[0].model_copy(update={"metrics": {"miou": float("nan")}})
    results.model_copy(update={"points": [point]}).write(tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert math.isnan(Results.read(tmp_path / "results.json").points[0].metrics["miou"])


def test_plots_and_page() -> None:
    results = example()
    drawn = plots(results)
    assert set(drawn) == {"cost", "time", "curves", "classes", "entropy"}
    for figure in drawn.values():
        assert figure.svg.lstrip().startswith(b"<?xml")
        assert figure.light != figure.dark
    assert plots(results)["cost"].svg == drawn["cost"].svg
    assert "int8" in drawn["time"].alt
    assert "int8" not in drawn["cost"].alt.partition(";")[0]  # nobody counts its operations
    depth = example("absrel", task="depth", classes=[])
    assert "depth" in plots(depth)
    page = render(report(results, [], [], drawn))
    assert "&lt;b&gt;nan&lt;/b&gt;" in page
    assert "2 of 6" not in page
    assert "3 of 6" in page


def test_a_comparison_without_a_finished_run_still_has_a_page() -> None:
    empty = example(cells=[], points=[], entropy={})
    assert "0 of 6" in render(report(empty, [], [], plots(empty)))


def test_names_are_no_formulas() -> None:
    """A dollar sign would begin one, and a wrong one ends in an error."""
    figure = bars("t", [Bars("IoU", "IoU", [r"$\frac$", "b_{2}"], {"bidense": [0.5, None]})], ["bidense"])
    assert figure.svg
