"""The integer program of an allocation: a multiple-choice knapsack under several limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bidensify._util.terminal import off_standard_output

__all__ = ["choose"]


def choose(
    target: Sequence[float], groups: Sequence[int], limits: Sequence[tuple[list[float], float]]
) -> list[int] | None:
    """One option of each group so that the sum of ``target`` is least and each limit holds; None where none does.

    The solver lets a limit slip by 1e-6: an option that breaks one whatever the others are is left out before, and a choice
    that breaks one in exact sums is cut off, after which it solves again.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    count, last = len(groups), max(groups) + 1
    one = np.zeros((last, count))
    one[list(groups), range(count)] = 1
    # The gap at which the solver stops is absolute, 1e-6.
    scale = 1e3 / (max((abs(value) for value in target), default=0.0) or 1.0)
    constraints, upper = [LinearConstraint(one, 1, 1)], np.ones(count)
    for line, limit in limits:
        least = [min(line[i] for i in range(count) if groups[i] == group) for group in range(last)]
        for i, group in enumerate(groups):
            if sum(least) - least[group] + line[i] > limit + 1e-12 * abs(limit):
                upper[i] = 0
        size = max(abs(limit), max(map(abs, line), default=0.0)) or 1.0
        constraints.append(LinearConstraint(np.array(line)[None] / size, -np.inf, limit / size))
    for _ in range(100):
        # HiGHS prints names of its own functions.
        with off_standard_output(drop=True):
            solved = milp(
                np.array(target) * scale,
                constraints=constraints,
                bounds=Bounds(0, upper),
                integrality=np.ones(count),
                options={"mip_rel_gap": 0.0},
            )
        if solved.x is None:
            return None
        picked = [i for i in range(count) if solved.x[i] > 0.5]
        if all(sum(line[i] for i in picked) <= limit + 1e-12 * abs(limit) for line, limit in limits):
            return picked
        cut = np.zeros((1, count))
        cut[0, picked] = 1
        constraints.append(LinearConstraint(cut, -np.inf, last - 1))
    return None
