"""A run's folder: what lies where, whether a run may start or go on in it, and its result."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

from bidensify._util.files import atomic_write, inside
from bidensify.errors import ConfigError, FormatError
from bidensify.recipe import Recipe, load_recipe
from bidensify.train.rundir.checkpoint import read_checkpoint
from bidensify.train.rundir.differences import at, differences
from bidensify.train.rundir.logs import versions, write_json

# What may differ when a run is resumed: where files are, how fast data comes and what is written down, not the result.
# The teacher is compared by its weights, not by where they lie or how they came about.
_FREE = (
    "data.workers", "data.root", "data.eval_batch_size", "log.", "checkpoint.", "device", "teacher", "distributed.strategy",
)  # fmt: skip
# What a run with a budget writes before it begins; a folder that holds nothing else is one of a run that has not begun.
_BEFORE = ("sensitivity.json", "sensitivity.json.part", "allocation.json")
_FILES = (
    "recipe.yaml", "inputs.json", "plan.json", "versions.json", "log.jsonl", "result.json", "model.safetensors",
    "checkpoints", "checkpoints/last.pt", "tensorboard", *_BEFORE,
)  # fmt: skip


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

    ``epoch`` counts over the whole run, ``batch`` within the epoch; ``sums`` are the epoch's losses so far, ``seconds`` what its
    steps so far took.
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
    seconds: float = 0.0
    log_position: int = 0

    @classmethod
    def read(cls, data: Any, where: Path) -> RunState:
        """Returns the state that a checkpoint holds.

        Raises:
            FormatError: it is not what a run writes.
        """
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise FormatError(f"checkpoint {str(where)!r} is not what a run writes: {error}") from error


class RunFolder:
    """Paths and files of a run; every one of them lies in the folder.

    Args:
        path: the folder.

    Attributes:
        longer: whether the recipe that :meth:`inspect` was given has more epochs than the run had.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.longer = path, False
        self.last = path / "checkpoints" / "last.pt"
        self.weights = path / "model.safetensors"
        self.recipe = path / "recipe.yaml"
        self.plan = path / "plan.json"
        self.sensitivity, self.allocation = path / "sensitivity.json", path / "allocation.json"
        self._inputs = path / "inputs.json"
        self._result = path / "result.json"

    def best(self, epoch: int) -> Path:
        """Returns the file of the weights that were best after ``epoch``."""
        return self.path / "checkpoints" / f"best-{epoch:04d}.safetensors"

    def clean(self, best_epoch: int) -> None:
        """Removes the weights of earlier best epochs, after a checkpoint that names ``best_epoch`` was written."""
        for file in self.last.parent.glob("best-*.safetensors"):
            if file != self.best(best_epoch):
                file.unlink()

    def check_places(self) -> None:
        """Checks that none of the run's files is a link that leads out of its folder.

        Raises:
            FormatError: one is; what reads or writes the run would read or write elsewhere.
        """
        for name in _FILES:
            try:
                inside(self.path, name)
            except ValueError as error:
                raise FormatError(f"the run's {name} is a link: {error}") from error

    def load_recipe(self, trust: bool = False) -> Recipe:
        """Returns the run's recipe; see :func:`bidensify.recipe.load_recipe` for ``trust``.

        Raises:
            ConfigError: the folder is not a run's, or its recipe has mistakes or names code.
            FormatError: a file of the run lies elsewhere.
        """
        if not self.recipe.is_file():
            raise ConfigError(f"{str(self.path)!r} is not a run folder: it has no recipe.yaml")
        self.check_places()
        return load_recipe(self.recipe, trust=trust)

    def teacher_weights(self) -> str | None:
        """Returns where the run's teacher came from, None where that is not known."""
        inputs = self.read(self._inputs) if self._inputs.is_file() else {}
        teacher = inputs.get("teacher")
        weights = teacher.get("weights") if isinstance(teacher, dict) else None
        return weights if isinstance(weights, str) else None

    def inspect(self, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
        """Returns the checkpoint to go on from, None for a fresh start; writes nothing.

        A run may go on for more epochs than its recipe had, in a stage that it is not past.

        Raises:
            ConfigError: the folder is in use, is not a run's, or is that of a run of another recipe.
            FormatError: the checkpoint cannot be read.
        """
        if not self.path.exists():
            return None
        if self.path.is_dir() and all(file.name in _BEFORE for file in self.path.iterdir()):
            self.check_places()
            return None
        if not self.path.is_dir():
            raise ConfigError(f"the run folder {str(self.path)!r} is a file; choose another")
        if not resume:
            raise ConfigError(
                f"the run folder {str(self.path)!r} exists and is not empty; choose another, remove it, or resume it"
            )
        old = self.load_recipe()
        changed = [p for p in differences(old.to_dict(), recipe.to_dict()) if not p.startswith(_FREE)]
        checkpoint = read_checkpoint(self.last) if self.last.exists() else None
        state = RunState.read(checkpoint["state"], self.last) if checkpoint is not None else RunState()
        longer = [path for path in changed if _is_longer(path, old, recipe, state)]
        self.longer = bool(longer)
        if len(longer) < len(changed):
            epochs = any(re.fullmatch(r"stages\[\d+\]\.epochs", path) for path in changed)
            hint = "; a stage may have more epochs than it had, as long as no later one has begun" if epochs else ""
            raise ConfigError(
                f"the run in {str(self.path)!r} has another recipe; it differs in {', '.join(changed[:5])}{hint}. Resume "
                "with the run's own recipe.yaml, or choose another run folder"
            )
        return checkpoint

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Compares what a resumed run is given with what it began with.

        Raises:
            ConfigError: another teacher, or data of another length.
        """
        if not self._inputs.is_file():
            return
        old = self.read(self._inputs)
        for path in differences(old, inputs):
            if path == "teacher.weights":
                continue
            if path.startswith("teacher"):
                was, now = (_teacher_title(item.get("teacher")) for item in (old, inputs))
                raise ConfigError(
                    f"the run in {str(self.path)!r} distilled from {was}; it cannot go on with {now}. Give that teacher "
                    "(-t, teacher_weights= or teacher=), or choose another run folder"
                )
            raise ConfigError(
                f"the run in {str(self.path)!r} began with other data: {path} was {at(old, path)!r} and is "
                f"{at(inputs, path)!r}; give the same data, or choose another run folder"
            )

    def begin(
        self, recipe: Recipe, student: nn.Module, fresh: bool, machine: dict[str, Any], inputs: dict[str, Any]
    ) -> None:
        """Writes all that decides the run: inputs.json, plan.json (of a rewritten model), and recipe.yaml (resolved).

        versions.json says what it runs on (``machine``). A run that goes on for more epochs than it had is not finished: what it
        ended with is kept, as model-N.safetensors and result-N.json after N epochs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.longer and self._result.is_file():
            ended = len(self.read(self._result).get("history", ()))
            for file in (self.weights, self._result):
                if file.is_file():
                    file.replace(file.with_name(f"{file.stem}-{ended}{file.suffix}"))
        # recipe.yaml goes last: its presence is what makes a folder one that can be resumed.
        if fresh:
            write_json(self.path / "versions.json", {**versions(), **machine})
            write_json(self._inputs, inputs)
            plan = getattr(student, "bidensify_plan", None)
            if plan is not None:
                write_json(self.plan, plan.to_dict())
        with atomic_write(self.recipe) as temporary:
            temporary.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")

    def write_result(self, name: str, result: RunResult) -> None:
        """Writes result.json."""
        data = {key: value for key, value in asdict(result).items() if key != "run_dir"}
        write_json(self._result, {"name": name, **data})

    def read_result(self, epochs: int) -> RunResult | None:
        """Returns the result of a run that is through with ``epochs`` epochs, None if it is not.

        Raises:
            FormatError: result.json is not what a run writes.
        """
        if not self._result.exists() or not self.weights.exists():
            return None
        data = {key: value for key, value in self.read(self._result).items() if key != "name"}
        for key in ("metrics", "teacher_metrics"):
            if isinstance(data.get(key), dict):  # JSON has no NaN
                data[key] = {name: math.nan if value is None else value for name, value in data[key].items()}
        try:
            result = TypeAdapter(RunResult).validate_python({**data, "run_dir": self.path})
        except ValidationError as error:
            raise FormatError(f"{str(self._result)!r} is not a run's result: {error}") from error
        return result if len(result.history) >= epochs else None

    def read(self, file: Path) -> dict[str, Any]:
        """Returns the object in a JSON file of the run.

        Raises:
            FormatError: it is cut short, edited, or none.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{str(file)!r} is not whole JSON ({error}); it was cut short or edited") from error
        if not isinstance(data, dict):
            raise FormatError(f"{str(file)!r} holds a {type(data).__name__}, not an object; it was edited")
        return data


def _teacher_title(teacher: Any) -> str:
    if not isinstance(teacher, dict):
        return "no teacher"
    return f"the teacher {teacher.get('weights') or 'given'} (weights {str(teacher.get('fingerprint'))[:12]}...)"


def _is_longer(path: str, old: Recipe, new: Recipe, state: RunState) -> bool:
    """Whether ``path`` is the number of epochs of a stage that now has more, and that the run is not past."""
    match = re.fullmatch(r"stages\[(\d+)\]\.epochs", path)
    if match is None:
        return False
    number = int(match.group(1))
    end = sum(stage.epochs for stage in old.stages[: number + 1])
    return new.stages[number].epochs > old.stages[number].epochs and (state.epoch, state.batch) <= (end, 0)
