"""What is counted of one variant over all batches: the task's metrics, and how far its output is from the teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from bidensify.losses import LOSSES, Loss, Outputs
from bidensify.tasks import Sample, Task

__all__ = ["Tally", "distance_of"]

_DISTANCES = {"classes": "kl", "labels": "bce", "values": "l1"}


def distance_of(task: Task) -> tuple[str, Loss]:
    """The distance from teacher to student that fits what a task's channels are, by the name of its loss term.

    KL divergence per pixel for classes ("kl"), its counterpart per label ("bce"), mean absolute difference for values ("l1").
    """
    name = _DISTANCES[getattr(task, "outputs", "classes")]
    return name, LOSSES[name]()


class Tally:
    """Running sums of one variant.

    Args:
        task: gives the metrics.
        distance: as ``distance_of`` gives it.
        device: where the outputs are.
    """

    def __init__(self, task: Task, distance: Loss, device: torch.device) -> None:
        self.task, self.distance = task, distance
        self.metrics = task.metrics().to(device)
        self.sum, self.images = 0.0, 0

    def add(self, output: Any, batch: Sample, teacher: Any) -> None:
        """Counts a batch: what the variant and the teacher (None without one) returned."""
        self.metrics.update(output, batch)
        count = len(batch["image"])
        if teacher is not None:
            self.sum += count * float(self.distance.value(Outputs(output, teacher), batch, self.task))
        self.images += count

    def result(self) -> tuple[float, float]:
        """(the task's primary metric, mean distance)."""
        return float(self.metrics.compute()[self.task.primary]), self.sum / max(self.images, 1)

    def state(self) -> dict[str, Any] | None:
        """The sums as JSON-able data; None where the metrics do not say theirs."""
        if not isinstance(self.metrics, Metric):
            return None
        values = self.metrics.metric_state
        if not all(isinstance(value, Tensor) for value in values.values()):
            return None
        held = {name: value.tolist() for name, value in values.items() if isinstance(value, Tensor)}
        return {"sum": self.sum, "images": self.images, "metrics": held}

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of ``state``; floats of JSON are exact."""
        assert isinstance(self.metrics, Metric)
        self.sum, self.images = float(state["sum"]), int(state["images"])
        for name, value in self.metrics.metric_state.items():
            assert isinstance(value, Tensor)
            setattr(self.metrics, name, torch.tensor(state["metrics"][name], dtype=value.dtype, device=value.device))
        self.metrics._update_count = 1
