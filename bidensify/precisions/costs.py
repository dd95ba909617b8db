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
from bidensify.precisions.precision import BINARY, PRECISIONS

__all__ = ["Costs", "costs_of"]


@dataclass(frozen=True)
class Costs:
    """Costs per sample.

    Attributes:
        rows: path of a binary layer -> what ``summary`` counts of it.
        times: measured milliseconds, or None.
        rest: of everything else.
        full: of the full-precision network.
    """

    rows: Mapping[str, LayerSummary]
    times: LayerTimes | None
    rest: Cost
    full: Cost

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of each layer in whatever precision."""
        return {path: row.binary_macs for path, row in self.rows.items()}

    def of(self, paths: Sequence[str], precisions: Sequence[str]) -> dict[str, Cost]:
        """The sum over ``paths`` in each precision."""
        found: dict[str, Cost] = {}
        for name in precisions:
            precision = PRECISIONS[name]
            total = Cost(macs=0, ops=0, bytes=0, ms=0)
            for path in paths:
                row = self.rows[path]
                ms = None if self.times is None else self.times.of(path, name)
                total = total.plus(
                    Cost(macs=precision.macs(row), ops=precision.ops(row), bytes=precision.bytes(row), ms=ms)
                )
            found[name] = total
        return found


def costs_of(
    student: nn.Module,
    teacher: nn.Module | None,
    input_size: Sequence[int],
    milliseconds: str | os.PathLike[str] | None = None,
) -> Costs:
    """Counts a student's layers and the full-precision network.

    A float layer counts what surrounds the binary one too (threshold, shift, bypass): a little more than it will cost, so
    that what fits a budget by these figures fits it.

    Args:
        student: latent.
        teacher: the full-precision network; without it, the student's layers in float stand for it.
        input_size: (C, H, W).
        milliseconds: see ``LayerTimes.load``.

    Raises:
        ConfigError, FormatError: see ``LayerTimes.load``.
    """
    counted = summary(student, tuple(input_size))
    rows = {row.path: row for row in counted.layers if row.binary_params}
    times = None if milliseconds is None else LayerTimes.load(milliseconds, list(rows))
    others = [row for row in counted.layers if not row.binary_params]
    rest = Cost(
        macs=sum(row.float_macs for row in others),
        ops=sum(row.ops for row in others),
        bytes=sum(row.bytes for row in others),
        ms=None if times is None else times.rest,
    )
    costs = Costs(rows, times, rest, rest)
    if teacher is None:
        return Costs(rows, times, rest, rest.plus(costs.of(list(rows), ["float"])["float"]))
    whole = summary(teacher, tuple(input_size))
    full = Cost(
        macs=whole.total("float_macs"),
        ops=whole.total("ops"),
        bytes=whole.total("bytes"),
        ms=None if times is None else rest.plus(costs.of(list(rows), ["float"])["float"]).ms,
    )
    return Costs(rows, times, rest, full)


def binary_total(costs: Costs) -> Cost:
    """Of the student with all its layers binary."""
    return costs.rest.plus(costs.of(list(costs.rows), [BINARY])[BINARY])
