"""Which weights a run ends with: those of the best epoch, with norm statistics that fit them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bidensify.nn import calibrate
from bidensify.recipe import Recipe
from bidensify.tasks import Task
from bidensify.train.rundir.checkpoint import save_weights
from bidensify.train.rundir.folder import RunFolder, RunState
from bidensify.train.stages import Epoch


class Selection:
    """Keeps the weights of the epoch that the recipe asks for (``evaluate.select``).

    Args:
        recipe, task: say what is best.
        folder: where weights are kept.
        main: whether this process writes.
    """

    def __init__(self, recipe: Recipe, task: Task, folder: RunFolder, main: bool) -> None:
        self.recipe, self.task, self.folder, self.main = recipe, task, folder, main

    def better(self, value: float, than: float | None) -> bool:
        """Whether one value of the primary metric is better than another (or there is no other, or it is NaN)."""
        if than is None or math.isnan(than):
            return True
        return value > than if self.task.higher_is_better else value < than

    def offer(
        self,
        weights: Mapping[str, Tensor] | nn.Module,
        metrics: dict[str, float],
        epoch: Epoch,
        final: bool,
        state: RunState,
    ) -> None:
        """Keeps ``weights`` if they are the best so far among those that are binarized as the result will be."""
        stages = self.recipe.stages
        if stages[epoch.stage].binarize != stages[-1].binarize:
            return
        value = metrics[self.task.primary]
        if final if self.recipe.evaluate.select == "last" else self.better(value, state.best):
            state.best, state.best_epoch, state.best_metrics = value, epoch.index, metrics
            if self.main:
                save_weights(weights, self.folder.best(epoch.index))

    def recalibrate(
        self,
        student: nn.Module,
        batches: Sequence[Tensor],
        before: dict[str, float],
        measure: Callable[[nn.Module], dict[str, float]],
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Re-estimates the norm statistics of averaged weights, and keeps them where the metric gets better.

        Statistics that were averaged along with the weights are those of other weights, not of the average.

        Returns:
            The metrics of the weights that were kept, and a record of both for the log.
        """
        kept = {key: value.clone() for key, value in student.state_dict().items()}
        calibrate(student, batches, thresholds=False, norms=True)
        after = measure(student)
        better = self.better(after[self.task.primary], before[self.task.primary])
        if not better:
            student.load_state_dict(kept)
        return after if better else before, {"before": before, "after": after, "kept": better}
