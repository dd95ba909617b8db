"""Reads what training runs left in their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bidensify._util.yamltext import parse_yaml
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
        recipe: the run's own.
    """

    folder: Path
    name: str
    method: str
    seed: int
    primary: str
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)

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
    path = Path(folder)
    if not (path / "recipe.yaml").is_file():
        raise ConfigError(f"{str(path)!r} is not a run folder (it has no recipe.yaml); give one that finetune wrote")
    if not (path / "result.json").is_file():
        raise ConfigError(f"the run in {str(path)!r} is not finished (it has no result.json); resume it first")
    try:
        recipe, _ = parse_yaml((path / "recipe.yaml").read_text(encoding="utf-8"))
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
            recipe=dict(recipe),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
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


# What two runs have to share before their metrics are of one kind: what it is called, and where the recipe says it.
_FOOTING = {
    "network": ("model",),
    "training data": ("data", "train"),
    "validation data": ("data", "val"),
    "input size": ("data", "size"),
    "training crops": ("data", "train_size"),
    "labels": ("task",),
    "batch size": ("data", "batch_size"),
    "precision": ("precision",),
    "folder of data": ("data", "root"),
    "how images come to the size": ("evaluate", "resize"),
    "multiple": ("evaluate", "multiple"),
    "windows": ("evaluate", "window"),
    "stride of windows": ("evaluate", "stride"),
    "mirrored views": ("evaluate", "flip"),
    "scales of views": ("evaluate", "scales"),
}


def footing(runs: Sequence[RunRecord]) -> list[str]:
    """Returns a line for each thing that the runs do not share, with who has what; empty: they are on the same footing."""
    shown = labels(runs)
    facts = {name: [_at(run.recipe, path) for run in runs] for name, path in _FOOTING.items()}
    facts["epochs"] = [len(run.history) for run in runs]
    lines = []
    for name, values in facts.items():
        texts = [_short(value) for value in values]
        if len(set(texts)) > 1:
            groups = {text: [who for who, own in zip(shown, texts, strict=True) if own == text] for text in texts}
            lines.append(f"{name}: " + "; ".join(f"{text} ({', '.join(who)})" for text, who in groups.items()))
    return lines


def _at(recipe: Any, path: Sequence[str]) -> Any:
    for key in path:
        recipe = recipe.get(key) if isinstance(recipe, dict) else None
    return recipe


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_short(item)}" for key, item in value.items() if item not in (None, {}, []))
    return "×".join(map(str, value)) if isinstance(value, list) and value else str(value)


def comparison(runs: Sequence[RunRecord]) -> Report:
    """The page that puts ``runs`` side by side: their metrics and how they got there.

    Raises:
        ConfigError: there is no run, or the runs are of different tasks.
    """
    table = metrics_table(runs)
    lead = "Final metrics on validation data, and how they got there. " + how_they_differ(runs)
    return Report("Comparison", lead, sections=[table, learning_curves(runs)])


def how_they_differ(runs: Sequence[RunRecord]) -> str:
    """Says whether the runs can be compared: that they share everything that counts, or in what they differ."""
    if len(runs) < 2:
        return ""
    lines = footing(runs)
    if not lines:
        return f"The {len(runs)} runs share network, data, labels, input size, batch size and epochs."
    return f"The {len(runs)} runs differ in more than their method: " + ". ".join(lines) + "."
