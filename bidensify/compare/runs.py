"""Reads what training runs left in their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidensify.compare.plots import Panel, colour_of, curves
from bidensify.compare.report import Figure, Report, Table
from bidensify.errors import ConfigError, FormatError


@dataclass(frozen=True)
class RunRecord:
    """One finished run.

    Attributes:
        folder: where it is.
        name: the recipe's name.
        method: the binarization method, or "float" for a full-precision run.
        seed: the recipe's seed.
        primary: the metric that chose the epoch.
        metrics: final metrics on the validation data.
        history: one record per epoch, as in ``result.json``.
    """

    folder: Path
    name: str
    method: str
    seed: int
    primary: str
    metrics: dict[str, float]
    history: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Training time, evaluation left out."""
        return float(sum(epoch["seconds"] for epoch in self.history))

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a training step."""
        return self.seconds / max(1, int(self.history[-1]["step"])) if self.history else float("nan")

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Returns (epoch, value) of ``loss``, or of a validation metric where it was measured; epochs count from 1."""
        points = []
        for epoch in self.history:
            value = epoch["loss"] if key == "loss" else (epoch.get("metrics") or {}).get(key)
            if value is not None:
                points.append((epoch["epoch"] + 1.0, float(value)))
        return points


def read_run(folder: str | Path) -> RunRecord:
    """Reads a finished run's folder.

    Raises:
        ConfigError: the folder is not that of a finished run.
        FormatError: its files are damaged.
    """
    import yaml

    path = Path(folder)
    if not (path / "recipe.yaml").is_file():
        raise ConfigError(f"{str(path)!r} is not a run folder (it has no recipe.yaml); give one that finetune wrote")
    if not (path / "result.json").is_file():
        raise ConfigError(f"the run in {str(path)!r} is not finished (it has no result.json); resume it first")
    try:
        recipe = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        binary = recipe["stages"][-1]["binarize"] != "none"
        return RunRecord(
            folder=path,
            name=str(recipe["name"]),
            method=str(recipe["binarize"].get("method", "bidense")) if binary else "float",
            seed=int(recipe["seed"]),
            primary=str(result["primary"]),
            metrics={str(name): float(value) for name, value in result["metrics"].items() if value is not None},
            history=list(result["history"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError) as error:
        raise FormatError(
            f"the run in {str(path)!r} is damaged ({type(error).__name__}: {error}); train it again"
        ) from error


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Returns one name per run: its method, and as much of its folder as it takes to tell runs apart."""
    methods = [run.method for run in runs]
    names = [run.method if methods.count(run.method) == 1 else f"{run.method} ({run.folder.name})" for run in runs]
    return [
        name if names.count(name) == 1 else f"{name[:-1]} in {run.folder.parent})"
        for name, run in zip(names, runs, strict=True)
    ]


def best_of(values: Sequence[float | None], higher_is_better: bool) -> int | None:
    """Returns the position of the best value, or None where there is none."""
    found = [(value, -place) for place, value in enumerate(values) if value is not None]
    if not found:
        return None
    best = max(found) if higher_is_better else min(found, key=lambda pair: (pair[0], -pair[1]))
    return -best[1]


def metrics_table(runs: Sequence[RunRecord], title: str = "Results") -> Table:
    """A row per run: its metrics (the classes' own left out), time per step and epochs.

    Raises:
        ConfigError: there is no run, or the runs are of different tasks.
    """
    if not runs:
        raise ConfigError("no run was given; give what read_run returns, one or more")
    primaries = sorted({run.primary for run in runs})
    if len(primaries) > 1:
        raise ConfigError(
            f"the runs are of different tasks ({', '.join(primaries)} chose their weights); compare one task"
        )
    names = [name for name in dict.fromkeys(name for run in runs for name in run.metrics) if "/" not in name]
    primary = runs[0].primary
    names.sort(key=lambda name: name != primary)
    shown = labels(runs)
    rows = []
    for name, run in zip(shown, runs, strict=True):
        values = [f"{run.metrics[metric]:.4f}" if metric in run.metrics else "–" for metric in names]
        rows.append([name, *values, f"{run.seconds_per_step:.3f}", str(len(run.history))])
    return Table(
        title,
        ["run", *names, "s / step", "epochs"],
        rows,
        swatches={i: colour_of(n, shown) for i, n in enumerate(shown)},
    )


def learning_curves(runs: Sequence[RunRecord], title: str = "Learning curves", *, note: str = "") -> Figure:
    """Training loss and the primary validation metric over epochs, a line per run."""
    primary, shown = runs[0].primary, labels(runs)
    pairs = list(zip(shown, runs, strict=True))
    panels = [
        Panel("Training loss", "epoch", "loss", {name: run.curve("loss") for name, run in pairs}, {}),
        Panel(f"Validation {primary}", "epoch", primary, {name: run.curve(primary) for name, run in pairs}, {}),
    ]
    return curves(title, panels, note=note)


def comparison(runs: Sequence[RunRecord]) -> Report:
    """The page that puts ``runs`` side by side: their metrics and how they got there.

    Raises:
        ConfigError: there is no run, or the runs are of different tasks.
    """
    lead = f"{len(runs)} runs on the same footing: final metrics on validation data, and how they got there."
    return Report("Comparison", lead, sections=[metrics_table(runs), learning_curves(runs)])
