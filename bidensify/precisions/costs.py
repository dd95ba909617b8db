"""What each binary layer costs in each precision, what the rest costs, and what the full-precision network costs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bidensify.costs.rows import LayerSummary
from bidensify.costs.summary import summary
from bidensify.precisions.findings import Cost
from bidensify.precisions.milliseconds import LayerTimes
from bidensify.precisions.precision import BINARY, FLOAT, INT8

__all__ = ["Costs", "costs_of"]


@dataclass(frozen=True)
class Costs:
    """Costs per sample.

    Attributes:
        rows: precision -> path of a binary layer -> what ``summary`` counts of it.
        times: measured milliseconds, or None.
        rest: of everything else.
        full: of the full-precision network.
    """

    rows: Mapping[str, Mapping[str, LayerSummary]]
    times: LayerTimes | None
    rest: Cost
    full: Cost

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of each layer in whatever precision."""
        return {path: row.binary_macs for path, row in self.rows[BINARY].items()}

    def of(self, paths: Sequence[str]) -> dict[str, Cost]:
        """The sum over ``paths`` in each precision that is known."""
        found: dict[str, Cost] = {}
        for name in [*self.rows, INT8, FLOAT]:
            total = Cost(macs=0, ops=0, bytes=0, ms=0)
            for path in paths:
                ms = None if self.times is None else self.times.of(path, name)
                total = total.plus(_cost(name, self.rows[name if name in self.rows else BINARY][path], ms))
            found[name] = total
        return found


def _cost(name: str, row: LayerSummary, ms: float | None) -> Cost:
    """A layer's cost in a precision, with all that surrounds it; ``row`` is the binary layer's where it has none."""
    weights, rest, macs = row.binary_params, 4 * row.float_params, row.binary_macs
    if name == FLOAT:
        return Cost(macs=macs, ops=2 * macs + row.elementwise, bytes=4 * weights + rest, ms=ms)
    if name == INT8:
        steps = max(row.output, default=0) + 2
        return Cost(macs=0, ops=macs / 2 + row.elementwise, bytes=weights + rest + 4 * steps, ms=ms)
    return Cost(macs=0, ops=row.ops, bytes=row.bytes, ms=ms)


def costs_of(
    students: Mapping[str, nn.Module],
    teacher: nn.Module | None,
    input_size: Sequence[int],
    milliseconds: str | os.PathLike[str] | None = None,
) -> Costs:
    """Counts the layers of students and the full-precision network.

    A float or int8 layer counts what surrounds the binary one too (threshold, shift, bypass): a little more than it will cost, so
    that what fits a budget by these figures fits it.

    Args:
        students: precision -> the network with all its layers in it; "binary" must be there.
        teacher: the full-precision network; without it, the student's layers in float stand for it.
        input_size: (C, H, W).
        milliseconds: see ``LayerTimes.load``.

    Raises:
        ConfigError, FormatError: see ``LayerTimes.load``.
    """
    counted = {name: summary(student, tuple(input_size)) for name, student in students.items() if name != INT8}
    rows = {name: {row.path: row for row in each.layers if row.binary_params} for name, each in counted.items()}
    times = None if milliseconds is None else LayerTimes.load(milliseconds, list(rows[BINARY]))
    others = [row for row in counted[BINARY].layers if not row.binary_params]
    rest = Cost(
        macs=sum(row.float_macs for row in others),
        ops=sum(row.ops for row in others),
        bytes=sum(row.bytes for row in others),
        ms=None if times is None else times.rest,
    )
    full = rest.plus(Costs(rows, times, rest, rest).of(list(rows[BINARY]))[FLOAT])
    if teacher is not None:
        whole = summary(teacher, tuple(input_size))
        names = {"macs": "float_macs", "ops": "ops", "bytes": "bytes"}
        full = full.model_copy(update={cost: whole.total(field) for cost, field in names.items()})
    return Costs(rows, times, rest, full)
