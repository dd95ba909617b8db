"""A run's folder: what lies where, whether a run may start or go on in it, and its result."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from bidensify._util.files import atomic_write
from bidensify.errors import ConfigError, FormatError
from bidensify.recipe import Recipe, load_recipe
from bidensify.train.checkpoint import read_checkpoint
from bidensify.train.logs import versions, write_json

# What may differ when a run is resumed: where files are, how fast data comes and what is written down, not the result.
_FREE = ("data.workers", "data.root", "data.eval_batch_size", "log.", "checkpoint.", "device", "teacher.weights")


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        run_dir: its folder; ``model.safetensors`` in it holds the weights that ``metrics`` were measured on.
        metrics: the task's metrics on the validation data.
        history: one record per epoch: losses, learning rate, speed and, where measured, metrics.
        best_epoch: the epoch (over the whole run, from 0) whose weights were chosen.
        primary: the metric that chose.
        steps: optimizer steps of the whole run.
        recalibrated: whether re-estimated norm statistics were better and are in the weights.
        teacher_metrics: the teacher's metrics on the same data, if there was a teacher.
    """

    run_dir: Path
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    best_epoch: int
    primary: str
    steps: int = 0
    recalibrated: bool = False
    teacher_metrics: dict[str, float] | None = None


@dataclass
class RunState:
    """Where a run is, beyond weights; saved in each checkpoint.

    ``epoch`` counts over the whole run, ``batch`` within the epoch; ``sums`` are the epoch's losses so far.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = -1
    best_metrics: dict[str, float] = field(default_factory=dict)
    teacher_metrics: dict[str, float] | None = None
    sums: list[float] = field(default_factory=list)
    log_position: int = 0


class RunFolder:
    """Paths and files of a run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last.pt"
        self.weights = path / "model.safetensors"
        self._result = path / "result.json"

    def best(self, epoch: int) -> Path:
        """Returns the file of the weights that were best after ``epoch``."""
        return self.path / "checkpoints" / f"best-{epoch:04d}.safetensors"

    def clean(self, best_epoch: int) -> None:
        """Removes the weights of earlier best epochs, after a checkpoint that names ``best_epoch`` was written."""
        for file in self.last.parent.glob("best-*.safetensors"):
            if file != self.best(best_epoch):
                file.unlink()

    def inspect(self, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
        """Returns the checkpoint to go on from, None for a fresh start; writes nothing.

        Raises:
            ConfigError: the folder is in use, is not a run's, or is that of a run of another recipe.
            FormatError: the checkpoint cannot be read.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        if not self.path.is_dir():
            raise ConfigError(f"the run folder {str(self.path)!r} is a file; choose another")
        if not resume:
            raise ConfigError(
                f"the run folder {str(self.path)!r} exists and is not empty; choose another, remove it, or resume it"
            )
        file = self.path / "recipe.yaml"
        if not file.is_file():
            raise ConfigError(f"{str(self.path)!r} is not a run folder (it has no recipe.yaml); it cannot be resumed")
        changed = [p for p in differences(load_recipe(file).to_dict(), recipe.to_dict()) if not p.startswith(_FREE)]
        if changed:
            raise ConfigError(
                f"the run in {str(self.path)!r} has another recipe; it differs in {', '.join(changed[:5])}. Resume "
                "with the run's own recipe.yaml, or choose another run folder"
            )
        return read_checkpoint(self.last) if self.last.exists() else None

    def begin(self, recipe: Recipe, student: nn.Module, fresh: bool, machine: dict[str, Any]) -> None:
        """Writes recipe.yaml (resolved), plan.json (of a rewritten model) and versions.json (with ``machine``)."""
        self.path.mkdir(parents=True, exist_ok=True)
        # recipe.yaml goes last: its presence is what makes a folder one that can be resumed.
        if fresh:
            write_json(self.path / "versions.json", {**versions(), **machine})
            plan = getattr(student, "bidensify_plan", None)
            if plan is not None:
                write_json(self.path / "plan.json", plan.to_dict())
        with atomic_write(self.path / "recipe.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")

    def write_result(self, name: str, result: RunResult) -> None:
        """Writes result.json."""
        data = {key: value for key, value in asdict(result).items() if key != "run_dir"}
        write_json(self._result, {"name": name, **data})

    def read_result(self) -> RunResult | None:
        """Returns the result of a finished run, None if the run is not finished.

        Raises:
            FormatError: result.json is not what a run writes.
        """
        if not self._result.exists() or not self.weights.exists():
            return None
        try:
            data = json.loads(self._result.read_text(encoding="utf-8"))
            data.pop("name")
            return RunResult(self.path, **data)
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(f"{str(self._result)!r} is not a run's result: {error}") from error


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns the paths at which two trees of JSON-able data differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [path]
