"""One optimizer step on a global batch, split over micro-batches and processes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bidensify.errors import TrainingError
from bidensify.recipe.distributed import forward_context, sum_over_processes
from bidensify.recipe.loaders import to_device
from bidensify.recipe.losses import Losses, widen
from bidensify.recipe.optim import Ema
from bidensify.recipe.schema import Recipe

Sample = dict[str, Tensor]


class NotFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite; the weights were not touched."""


class Step:
    """Forward, backward, clipping, AdamW and the moving average, for one stage.

    Args:
        student: the network whose parameters are stepped.
        model: what is called: the student, or its wrapper in a run of several processes.
        teacher: the full-precision network, in eval mode, or None.
        optimizer: over the student's parameters.
        losses: the stage's terms.
        ema: moving average to update, or None.
        recipe: gives batch, precision and clipping options.
        accelerator: the run's.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        model: nn.Module,
        teacher: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        losses: Losses,
        ema: Ema | None,
        recipe: Recipe,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.model, self.losses, self.ema = student, model, losses, ema
        self.teacher = teacher if losses.section.distils else None
        self.optimizer, self.recipe, self.accelerator = optimizer, recipe, accelerator

    def __call__(self, batch: Sample) -> list[float]:
        """Steps on this process's part of a global batch.

        Returns:
            [the weighted loss, each unweighted term ...], means over the global batch.

        Raises:
            NotFiniteError: the loss, or with clipping the gradient, is not finite.
        """
        processes = self.accelerator.num_processes
        parts = self._parts(to_device(batch, self.accelerator.device, self.recipe.channels_last, self.student))
        weights = [self.losses.weights(part) for part in parts]
        total = sum_over_processes(torch.stack(weights).sum(0)).clamp(min=1e-12)
        factors = torch.tensor(list(self.losses.factors.values()), dtype=torch.float64, device=total.device)
        sums = torch.zeros_like(total)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            share = weight / total
            # DDP averages gradients over the processes; their number as a factor makes it the sum that shares call for.
            factor = factors * share * processes
            waits = processes > 1 and index < len(parts) - 1
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                terms = torch.stack(self._terms(part))
                self.accelerator.backward((terms * factor.to(terms.dtype)).sum())
            sums += terms.detach().double() * share
        sums = sum_over_processes(sums)
        values = [float((sums * factors).sum()), *sums.tolist()]
        self._check(values)
        if self.recipe.optimizer.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.optimizer.clip)
            if not math.isfinite(norm.item()):
                raise NotFiniteError(f"the gradient's norm is {norm.item()} while the loss is {values[0]:.4g}")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return values

    def _parts(self, batch: Sample) -> list[Sample]:
        count = self.recipe.data.accumulate
        if count == 1:
            return [batch]
        chunks = {key: value.chunk(count) for key, value in batch.items()}
        return [{key: chunks[key][i] for key in chunks} for i in range(count)]

    def _terms(self, part: Sample) -> list[Tensor]:
        teacher_output: Any = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_output = self.teacher(part["image"])
        with forward_context(self.accelerator):
            output = self.model(part["image"])
        return [widen(value) for value in self.losses.values(output, part, teacher_output)]

    def _check(self, values: list[float]) -> None:
        if not all(map(math.isfinite, values)):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.losses.names, values[1:], strict=True))
            raise NotFiniteError(f"the loss is {values[0]:.4g} ({terms})")
