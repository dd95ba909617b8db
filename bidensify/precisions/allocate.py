"""``bidensify.allocate``: one precision for each layer under a budget: a knapsack, where greedy choices fail small budgets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bidensify._util.terminal import console
from bidensify.config import BidensifyConfig, Rule
from bidensify.costs.summary import summary
from bidensify.errors import ConfigError
from bidensify.precisions.budget import Budget, read_budget
from bidensify.precisions.findings import By, Cost, Row
from bidensify.precisions.precision import BINARY, FLOAT, INT8, PRECISIONS
from bidensify.precisions.program import choose
from bidensify.precisions.result import Sensitivity
from bidensify.rewrite.api import bidensify

__all__ = ["Allocation", "allocate", "allocation"]

_GLOB = re.compile(r"[*?\[\]]")


@dataclass(frozen=True)
class Allocation:
    """Who gets which precision.

    Attributes:
        config: of the rewrite: the student's, with a rule for each layer that is not binary.
        chosen: path of each layer -> precision.
        cost: expected, of the whole network.
        full: of the full-precision network.
        metric: name of the task's metric.
        expected, teacher: the metric that is expected, and that of the full-precision network.
        trained: whether ``expected`` is scaled by what a trained student lost; else it is what the layers lose before training.
        by: what counted as harm, "metric" or "distance".
        budget: what was asked for.
    """

    config: BidensifyConfig
    chosen: dict[str, str]
    cost: Cost
    full: Cost
    metric: str
    expected: float
    teacher: float
    trained: bool
    by: By
    budget: Budget

    @property
    def shares(self) -> dict[str, float]:
        """Of the full-precision network's float MACs, operations and bytes."""
        return {name: getattr(self.cost, name) / getattr(self.full, name) for name in ("macs", "ops", "bytes")}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "budget": self.budget.model_dump(exclude_defaults=True),
            "shares": self.shares,
            "ms": self.cost.ms,
            "metric": self.metric,
            "expected": self.expected,
            "teacher": self.teacher,
            "trained": self.trained,
            "by": self.by,
            "chosen": self.chosen,
            "config": self.config.to_dict(),
        }

    def lines(self) -> list[str]:
        """What is expected, in words."""
        counts = [
            f"{list(self.chosen.values()).count(name)} {name}" for name in PRECISIONS if name in self.chosen.values()
        ]
        costs = [f"{100 * share:.1f} % of {name}" for name, share in self.shares.items()]
        costs += [f"{self.cost.ms:.2f} ms"] if self.cost.ms is not None else []
        how = "by what the trained student lost" if self.trained else "the layers' losses added up, before any training"
        if self.by == "distance" and not self.trained:
            how += f"; chosen by the distance to the teacher, so more budget may come with a little less {self.metric}"
        return [
            f"{len(self.chosen)} layers: {', '.join(counts)}",
            f"cost: {', '.join(costs)} (budget: {', '.join(f'{key} {value:g}' for key, value in self.budget.bounds.items())})",
            f"expected {self.metric}: {self.expected:.4f}, full precision {self.teacher:.4f} ({how})",
        ]


def allocate(
    sensitivity: Sensitivity,
    budget: Budget | Mapping[str, Any] | None = None,
    *,
    network: nn.Module | None = None,
    quiet: bool = False,
    **bounds: Any,
) -> BidensifyConfig:
    """The configuration that gives each layer the precision which it deserves under a budget; prints what it expects.

    Args:
        sensitivity: measured around the teacher.
        budget: see :class:`bidensify.precisions.Budget`; a mapping ({"ops": 0.2}), or its keys as keywords (ops=0.2).
        network: the full-precision network: then the bounds of MACs, operations and bytes are held by ``bidensify.summary`` of
            the rewritten network, not by the sums of its layers' costs alone (which are a little above it).
        quiet: print nothing.
        bounds: keys of the budget.

    Raises:
        ConfigError: a budget that breaks its schema, that cannot be met, or under which nothing would be binary; a sensitivity
            around the student; milliseconds without a table of them.
    """
    found = allocation(sensitivity, read_budget(budget, **bounds), network)
    if not quiet:
        for line in found.lines():
            console().print(line, soft_wrap=True)
    return found.config


def allocation(sensitivity: Sensitivity, budget: Budget, network: nn.Module | None = None) -> Allocation:
    """``allocate`` with everything that is known of the result."""
    if sensitivity.around != "teacher" or sensitivity.teacher is None:
        raise ConfigError(
            "allocate: the sensitivity was measured around the student, whose layers mostly lose by float; measure around the "
            "teacher (around='teacher')"
        )
    bounds = dict(budget.bounds)
    for _ in range(8):
        chosen = _solve(sensitivity, budget, bounds)
        result = _described(sensitivity, budget, chosen)
        if network is None or not (over := _over(result, network, sensitivity.input_size)):
            return result
        bounds.update({name: bounds[name] * 0.999 / factor for name, factor in over.items()})
    raise ConfigError(f"allocate: no rewrite of the network was found whose summary keeps the budget {budget.bounds}")


def _harm_of(sensitivity: Sensitivity, budget: Budget) -> tuple[By, float]:
    """(what counts as harm, metric that is lost per unit of harm)."""
    teacher, student = sensitivity.teacher, sensitivity.student
    assert teacher is not None
    if student is None:
        # Before training the metric's own losses are the only ones in its unit.
        if budget.accuracy is not None and budget.by == "distance":
            raise ConfigError(
                "allocate: accuracy with by='distance' needs to know what a trained student lost; measure one (trained=True), or "
                "leave by out"
            )
        known: By = "metric" if budget.accuracy is not None or sensitivity.distance is None else "distance"
        return budget.by or known, 1.0
    by: By = budget.by or ("metric" if sensitivity.distance is None else "distance")
    whole = sum(max(0.0, sensitivity.gain(row, FLOAT, by)) for row in sensitivity.layers)
    # Below 0 where the student is better than its teacher.
    lost = (teacher.metric - student.metric) * (1 if sensitivity.higher_is_better else -1)
    return by, lost / whole if whole > 0 else 0.0


def _harm(sensitivity: Sensitivity, row: Row, precision: str, by: By) -> float:
    """What a layer in ``precision`` costs against float, never below 0."""
    return max(0.0, sensitivity.gain(row, FLOAT, by) - sensitivity.gain(row, precision, by))


def _solve(sensitivity: Sensitivity, budget: Budget, bounds: Mapping[str, float]) -> dict[str, str]:
    by, scale = _harm_of(sensitivity, budget)
    allowed = [
        n for n in sensitivity.precisions if budget.precisions is None or n in (*budget.precisions, BINARY, FLOAT)
    ]
    rows = sensitivity.layers
    costs = [name for name in bounds if name != "accuracy"]
    aim = budget.minimize or ("ms" if sensitivity.rest.ms is not None else "ops")
    needed = dict.fromkeys([*costs, *([aim] if budget.accuracy is not None else [])])
    for cost in needed:
        _value(sensitivity.rest, cost)
    # A precision whose milliseconds nobody measured is no choice under a budget of milliseconds; binary and float are measured.
    options = [
        (index, name, _harm(sensitivity, row, name, by), {cost: _value(row.costs[name], cost) for cost in needed})
        for index, row in enumerate(rows)
        for name in allowed
        if name in row.costs
        and sensitivity.has(row, name)
        and (name in (BINARY, FLOAT) or all(getattr(row.costs[name], c) is not None for c in needed))
    ]
    limits: list[tuple[str, list[float], float]] = []
    for cost in costs:
        full = 1.0 if cost == "ms" else getattr(sensitivity.full, cost)
        rest = _value(sensitivity.rest, cost)
        limits.append((cost, [option[3][cost] for option in options], bounds[cost] * full - rest))
    harm = [option[2] for option in options]
    target = harm
    if budget.accuracy is not None:
        target = [option[3][aim] for option in options]
        limits.append(("accuracy", [scale * value for value in harm], bounds["accuracy"]))
    picked = choose(target, [option[0] for option in options], [(line, limit) for _, line, limit in limits])
    if picked is None:
        raise ConfigError(_infeasible(budget, limits, [option[0] for option in options], sensitivity))
    return {rows[options[i][0]].name: options[i][1] for i in picked}


def _value(cost: Cost, name: str) -> float:
    value = getattr(cost, name)
    if value is None:
        raise ConfigError(
            "allocate: a budget in milliseconds needs the measured milliseconds of each layer; give the table to "
            "bidensify.sensitivity (milliseconds=)"
        )
    return float(value)


def _infeasible(
    budget: Budget, limits: Sequence[tuple[str, list[float], float]], groups: Sequence[int], sensitivity: Sensitivity
) -> str:
    """Why, with the least that each bound can be by itself."""
    least = []
    for name, line, _ in limits:
        best: dict[int, float] = {}
        for group, value in zip(groups, line):
            best[group] = min(value, best.get(group, value))
        reach = sum(best.values())
        if name in ("macs", "ops", "bytes"):
            reach = (reach + getattr(sensitivity.rest, name)) / getattr(sensitivity.full, name)
        elif name == "ms":
            reach += sensitivity.rest.ms or 0.0
        least.append(f"{name} {budget.bounds[name]:g} (at least {reach:.4g} by itself)")
    return f"allocate: no choice of precisions keeps {' and '.join(least)}; give more"


def _described(sensitivity: Sensitivity, budget: Budget, chosen: dict[str, str]) -> Allocation:
    assert sensitivity.teacher is not None
    if set(chosen.values()) <= {INT8, FLOAT}:
        whole, other = ("stay in full precision", "the network as it is")
        if INT8 in chosen.values():
            whole, other = ("have int8 or full precision", "a runtime's own int8 (OpenVINO, XNNPACK)")
        raise ConfigError(
            f"allocate: under {budget.bounds} every layer may {whole}, so there is nothing to rewrite; use {other}, or give a "
            "smaller budget"
        )
    cost = sensitivity.rest
    for row in sensitivity.layers:
        cost = cost.plus(row.costs[chosen[row.name]])
    trained = sensitivity.student is not None
    by, scale = _harm_of(sensitivity, budget)
    # Before training no other harm is in the metric's unit.
    counted: By = by if trained else "metric"
    lost = scale * sum(_harm(sensitivity, row, chosen[row.name], counted) for row in sensitivity.layers)
    base = BidensifyConfig.from_dict(sensitivity.config)
    rules = [
        Rule(_pattern(path), action) for path, name in chosen.items() if (action := PRECISIONS[name].action) is not None
    ]
    return Allocation(
        config=dataclasses.replace(base, rules=(*rules, *base.rules)),
        chosen=chosen,
        cost=cost,
        full=sensitivity.full,
        metric=sensitivity.metric,
        expected=sensitivity.teacher.metric + lost * (-1 if sensitivity.higher_is_better else 1),
        teacher=sensitivity.teacher.metric,
        trained=trained,
        by=by,
        budget=budget,
    )


def _pattern(path: str) -> str:
    return f"re:{re.escape(path)}" if _GLOB.search(path) else path


def _over(found: Allocation, network: nn.Module, input_size: Sequence[int]) -> dict[str, float]:
    """Bounds that the rewritten network breaks, and by which factor."""
    example = torch.zeros(2, *input_size)
    counted = summary(bidensify(network, found.config, example_inputs=example, verify=False), tuple(input_size))
    costs = {"macs": "float_macs", "ops": "ops", "bytes": "bytes"}
    shares = {name: counted.total(field) / getattr(found.full, name) for name, field in costs.items()}
    bounds = found.budget.bounds
    return {name: shares[name] / bounds[name] for name in costs if name in bounds and shares[name] > bounds[name]}
