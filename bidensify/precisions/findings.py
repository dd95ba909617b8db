"""What a sensitivity analysis looks at and what it found, as plain data: units, and what each costs and gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bidensify._util.names import near
from bidensify.errors import ConfigError
from bidensify.precisions.precision import BINARY, FLOAT, PRECISIONS

__all__ = ["COSTS", "By", "Cost", "Findings", "Measured", "Row", "Unit", "units_of"]

# What gains are divided by, and budgets are of.
COSTS = ("macs", "ops", "bytes", "ms")
By = Literal["metric", "distance"]


class _Data(BaseModel):
    # A metric that is no number reads back as none, which null would not.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Measured(_Data):
    """The task's primary metric, and the mean distance to the teacher's output (None without a teacher)."""

    metric: float
    distance: float | None = None


class Cost(_Data):
    """Of one layer or network, per sample: multiply-accumulates in full precision, operations, bytes of parameters, and
    milliseconds where a table of measured ones was given."""

    macs: float
    ops: float
    bytes: float
    ms: float | None = None

    def plus(self, other: Cost) -> Cost:
        """The sum; milliseconds only where both have them."""
        ms = None if self.ms is None or other.ms is None else self.ms + other.ms
        return Cost(macs=self.macs + other.macs, ops=self.ops + other.ops, bytes=self.bytes + other.bytes, ms=ms)


class Row(_Data):
    """One layer or group.

    Attributes:
        name: module path of the layer, or the prefix of the group.
        layers: paths of its layers.
        depth: its place in the order of first calls, 0 to 1.
        macs: multiply-accumulates per sample in whatever precision.
        costs: by precision.
        measured: by precision, of the student with this unit alone in it.
    """

    name: str
    layers: tuple[str, ...]
    depth: float
    macs: float
    costs: dict[str, Cost]
    measured: dict[str, Measured]

    @property
    def group(self) -> bool:
        """Whether it is a block or a stage rather than a layer."""
        return self.layers != (self.name,)


class Findings(_Data):
    """What each binary layer costs in accuracy, and what it would cost otherwise.

    Attributes:
        key: what tells this analysis from others: of the networks' weights, the data and the options.
        network: its class.
        fingerprint: of the student (names and shapes of its state).
        config: the configuration of the student's rewrite.
        around: what each unit was measured in: the full-precision network ("teacher"; the unit alone is in another precision), or
            the student ("student"; the unit alone is in float).
        metric, higher_is_better: the task's primary metric.
        distance: name of the loss term that is the distance to the teacher ("kl", ...); None without a teacher.
        samples, input_size: images that were measured, (C, H, W) of the first.
        teacher: of the full-precision network.
        student: of the student as it is, all layers binary, where it is trained (or what is measured around).
        rest: cost of everything that is no binary layer of the student.
        full: cost of the full-precision network.
        rows: layers in the order of their first call, then groups.
        machine, seconds: what measured, and how long it took.
    """

    version: Literal[1] = 1
    key: str = ""
    network: str
    fingerprint: str
    config: dict[str, object]
    around: Literal["teacher", "student"]
    metric: str
    higher_is_better: bool
    distance: str | None
    samples: int
    input_size: tuple[int, ...]
    teacher: Measured | None
    student: Measured | None
    rest: Cost
    full: Cost
    rows: tuple[Row, ...]
    machine: str = ""
    seconds: float = 0.0

    @property
    def layers(self) -> list[Row]:
        """The rows of single layers."""
        return [row for row in self.rows if not row.group]

    @property
    def groups(self) -> list[Row]:
        """The rows of blocks and stages."""
        return [row for row in self.rows if row.group]

    @property
    def precisions(self) -> list[str]:
        """The precisions that are known, "binary" first and "float" last."""
        found = {name for row in self.rows for name in row.measured}
        return [name for name in PRECISIONS if name in found | {BINARY, FLOAT}]

    def has(self, row: Row, precision: str) -> bool:
        """Whether a unit was measured in ``precision``: not every method has every one."""
        return precision in row.measured or precision == (FLOAT if self.around == "teacher" else BINARY)

    def measured(self, row: Row, precision: str) -> Measured:
        """Of the network with the unit alone in ``precision``, and all else as it is around it.

        Raises:
            ConfigError: that precision was not measured.
        """
        home, base = (FLOAT, self.teacher) if self.around == "teacher" else (BINARY, self.student)
        if precision == home and base is not None:
            return base
        if precision not in row.measured:
            raise ConfigError(f"{precision!r} was not measured{near(precision, self.precisions)}")
        return row.measured[precision]

    def gain(self, row: Row, precision: str = FLOAT, by: By = "metric") -> float:
        """What ``precision`` gains over binary in this unit: of the metric upwards, of the distance downwards.

        Raises:
            ConfigError: that precision was not measured, or ``by`` is "distance" and there was no teacher.
        """
        new, old = self.measured(row, precision), self.measured(row, BINARY)
        if by == "metric":
            return (new.metric - old.metric) * (1 if self.higher_is_better else -1)
        if new.distance is None or old.distance is None:
            raise ConfigError(
                "there was no teacher, so no distance to it is known; give teacher= to bidensify.sensitivity"
            )
        return old.distance - new.distance

    def added(self, row: Row, precision: str, cost: str) -> float:
        """What ``precision`` costs more than binary, of "macs", "ops", "bytes" or "ms".

        Raises:
            ConfigError: milliseconds, and there is no table of them.
        """
        values = [getattr(row.costs[name], cost) for name in (precision, BINARY)]
        if None in values:
            raise ConfigError(
                "no milliseconds are known of the layers; give the table that `bidensify bench --layers` wrote"
            )
        return float(values[0] - values[1])


@dataclass(frozen=True)
class Unit:
    """A layer, or several of one block.

    Attributes:
        name: the layer's path, or the prefix that the layers have in common.
        layers: the layers' paths, in the order in which they are called.
    """

    name: str
    layers: tuple[str, ...]

    @property
    def group(self) -> bool:
        """Whether it is a block or a stage."""
        return self.layers != (self.name,)


def units_of(paths: Sequence[str], groups: Sequence[str] | None = None) -> list[Unit]:
    """Every layer, then every group, each in the order of first call.

    Args:
        paths: of the binary layers, in the order in which they are called.
        groups: prefixes of module paths ("encoder.layer1"); None for every one that holds at least two layers, but not
            all of them; of prefixes that hold the same layers, the shortest.

    Raises:
        ConfigError: a prefix that holds no binary layer.
    """
    layers = [Unit(path, (path,)) for path in paths]
    found: dict[tuple[str, ...], str] = {}
    if groups is None:
        prefixes = {".".join(path.split(".")[:n]) for path in paths for n in range(1, path.count(".") + 1)}
        for prefix in sorted(prefixes, key=lambda text: (text.count("."), text)):
            inside = _inside(prefix, paths)
            if 1 < len(inside) < len(paths):
                found.setdefault(inside, prefix)
    else:
        known = {".".join(path.split(".")[:n]) for path in paths for n in range(1, path.count(".") + 2)}
        for prefix in groups:
            if prefix not in known:
                raise ConfigError(f"the group {prefix!r} holds no binary layer{near(prefix, sorted(known))}")
            if prefix not in paths:
                found.setdefault(_inside(prefix, paths), prefix)
    order = {path: number for number, path in enumerate(paths)}
    named = [Unit(prefix, inside) for inside, prefix in found.items()]
    return layers + sorted(named, key=lambda unit: (order[unit.layers[0]], -len(unit.layers)))


def _inside(prefix: str, paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if path.startswith(f"{prefix}."))
