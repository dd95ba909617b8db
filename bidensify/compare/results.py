"""``results.json`` of a comparison: its schema, reading and writing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bidensify._util.files import atomic_write
from bidensify.errors import FormatError

__all__ = ["RESULTS_VERSION", "Cell", "Entropy", "Point", "Results"]

RESULTS_VERSION = 1


class _Strict(BaseModel):
    # A metric that is no number reads back as none, which null would not.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Cell(_Strict):
    """One run of the matrix.

    Attributes:
        method, seed: its place.
        folder: the run's folder, relative to the comparison's.
        state: "done", "failed" (``error`` says why) or "open" (not run yet).
        metrics: final metrics on the validation data.
        history: per epoch, counted from 1: ``epoch``, ``loss`` and the primary metric where it was measured.
        seconds_per_step: mean time of a training step.
    """

    method: str
    seed: int
    folder: str
    state: Literal["done", "failed", "open"] = "open"
    error: str = ""
    metrics: dict[str, float] = {}
    history: list[dict[str, float]] = []
    seconds_per_step: float | None = None


class Entropy(_Strict):
    """Bits of information per channel of one network's activations, before and after its first binarization."""

    layer: str
    before: list[float]
    after: list[float]


class Point(_Strict):
    """One network on the plots of accuracy against cost.

    Attributes:
        name: a method, or "float", "bf16", "int8".
        kind: "float" (full precision and its lower-precision forms) or "binary".
        metrics: of this network (for a method: of its first finished seed, packed), where they were measured.
        ops: operations per image as the literature counts them; None for int8, which it does not count.
        bytes: of the weights' file.
        milliseconds: median of one image, all networks in turn; None where it was not timed.
        note: what the reader has to know, for example why it is not packed.
    """

    name: str
    kind: Literal["float", "binary"]
    metrics: dict[str, float] = {}
    ops: float | None = None
    bytes: int | None = None
    milliseconds: float | None = None
    note: str = ""


class Results(_Strict):
    """Everything that a comparison measured; ``version`` tells later readers which fields there are."""

    version: Literal[1] = 1
    name: str
    task: str
    primary: str
    higher_is_better: bool
    classes: list[str] = []
    recipe: dict[str, Any]
    size: tuple[int, int]
    methods: list[str]
    seeds: list[int]
    teacher: dict[str, float] = {}
    cells: list[Cell] = []
    points: list[Point] = []
    entropy: dict[str, Entropy] = {}
    machine: dict[str, str] = Field(default_factory=dict)

    def finished(self, method: str) -> list[Cell]:
        """The finished runs of a method, by seed."""
        return sorted((c for c in self.cells if c.method == method and c.state == "done"), key=lambda c: c.seed)

    def spread(self, method: str, metric: str) -> tuple[float, float, int] | None:
        """(mean, standard deviation, runs) of a metric over a method's finished seeds; None where there is none.

        The deviation is that of a sample (n - 1); 0 for a single run.
        """
        return spread([cell.metrics[metric] for cell in self.finished(method) if metric in cell.metrics])

    def point(self, name: str) -> Point | None:
        """The point of a network."""
        return next((point for point in self.points if point.name == name), None)

    def ranked(self) -> list[str]:
        """The methods, best mean of the primary metric first, those without a finished run last."""
        sign = -1 if self.higher_is_better else 1

        def key(method: str) -> tuple[float, int]:
            found = self.spread(method, self.primary)
            return (math.inf if found is None else sign * found[0], self.methods.index(method))

        return sorted(self.methods, key=key)

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads a file that ``write`` wrote.

        Raises:
            FormatError: it is of another version or damaged.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            lines = str(error).splitlines()
            raise FormatError(
                f"{str(path)!r} is no results file of version {RESULTS_VERSION} ({' '.join(lines[:3])[:300]}); run the "
                "comparison again"
            ) from error


def spread(values: Sequence[float]) -> tuple[float, float, int] | None:
    """(mean, standard deviation, count) of a sample; None of nothing."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)
