"""What a run leaves behind and shows: log.jsonl, TensorBoard, versions.json and the progress display."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bidensify._util.files import atomic_write
from bidensify.recipe import Recipe

_PACKAGES = ("bidensify", "torch", "torchvision", "torchmetrics", "accelerate", "numpy", "safetensors", "pydantic")
_MODELS = ("segmentation_models_pytorch", "timm", "transformers")


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, whole or not at all; NaN and infinity become null, as JSON has neither."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(plain(data), indent=2) + "\n", encoding="utf-8")


def plain(data: Any) -> Any:
    """Returns ``data`` with floats that JSON cannot hold as None."""
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_revision() -> dict[str, Any]:
    """Returns the revision of bidensify's own checkout and whether files differ from it; None where there is none.

    A package that is installed below some other repository (a virtual environment in a project) has no revision.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top) / "bidensify" != Path(__file__).resolve().parents[2]:
        return {"revision": None, "modified": None}
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"revision": _git("rev-parse", "HEAD"), "modified": None if status is None else bool(status)}


def versions() -> dict[str, Any]:
    """Returns versions of Python and packages, and the git revision of bidensify's checkout (None outside of one)."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "argv": sys.argv}
    for package in (*_PACKAGES, *_MODELS):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["git"] = git_revision()
    return found


class RunLog:
    """Log files and display of a run; does nothing on processes other than the main one.

    Args:
        folder: the run folder.
        recipe: gives name and log options.
        main: whether this is the main process.
        position: bytes of log.jsonl to keep: those that the resumed checkpoint knows of.
        step: steps done; TensorBoard drops what it has of later ones.
        quiet: print nothing.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, main: bool, position: int = 0, step: int = 0, quiet: bool = False
    ) -> None:
        self._main, self._recipe = main, recipe
        self._console = Console(quiet=quiet or not main)
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._board: Any = None
        if not main:
            return
        path = folder / "log.jsonl"
        self._file = open(path, "ab")  # noqa: SIM115 - open for the run's life
        self._file.truncate(position)
        if recipe.log.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if self._console.is_terminal and not self._console.quiet:
            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn(
                    "loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[rate]} images/s  ETA", markup=False
                ),
                TimeRemainingColumn(),
            ]
            self._progress = Progress(*columns, console=self._console)

    def __enter__(self) -> RunLog:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._main:
            return
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    @property
    def position(self) -> int:
        """Bytes written to log.jsonl so far."""
        return self._file.tell() if self._main else 0

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Appends a line to log.jsonl and writes it out."""
        if self._main:
            self._file.write(json.dumps({"kind": kind, **plain(record)}).encode() + b"\n")
            self._file.flush()

    def scalars(self, group: str, values: dict[str, float], step: int) -> None:
        """Adds scalars ``group/name`` to TensorBoard."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start_bar(self, total: int, done: int) -> None:
        """Shows the run's progress in steps."""
        if self._progress is not None:
            self._bar = self._progress.add_task("", total=total, completed=done, loss="-", metric="", rate="-")

    def advance(self, step: int, title: str, loss: float, rate: float) -> None:
        """Moves the display to ``step`` steps done."""
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, description=title, loss=f"{loss:.4f}", rate=f"{rate:.1f}")

    def metric(self, text: str) -> None:
        """Shows the latest metric beside the progress."""
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, metric=text)
