"""One optimizer step on a global batch, split over micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bidensify._util.machine import has_compiler
from bidensify.data.batches import to_device
from bidensify.errors import ConfigError, FormatError, TrainingError
from bidensify.kernels import dense
from bidensify.losses import Features, Losses
from bidensify.losses.terms import widen
from bidensify.recipe import Recipe
from bidensify.recipe.sections import StageSection
from bidensify.tasks import Task
from bidensify.train.distributed import forward_context, sum_over_processes
from bidensify.train.optim import Ema, build_optimizer
from bidensify.train.sharded import Sharded, whole

Sample = dict[str, Tensor]


class NotFiniteError(TrainingError):
    """A loss or a gradient is NaN or infinite; the weights were not touched."""


class Step:
    """Forward, backward, clipping, AdamW and the moving average, for one stage.

    Args:
        student: the network whose parameters are stepped.
        model: what is called: the student, or its wrapper in a run of several processes, or in one that is compiled.
        sharded: what holds the sharded copy of the student that is trained in its place, or None.
        teacher: the full-precision network, in eval mode, or None.
        optimizer: over the student's parameters.
        losses: the stage's terms.
        ema: moving average to update, or None; of the student's whole weights.
        recipe: gives batch, precision and clipping options.
        accelerator: the run's.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        model: nn.Module,
        sharded: Sharded | None,
        teacher: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        losses: Losses,
        ema: Ema | None,
        recipe: Recipe,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.model, self.losses, self.ema = student, model, losses, ema
        self.sharded = sharded
        self.trained = student if sharded is None else sharded.model
        self.teacher = teacher if losses.distils else None
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
            with self._waiting() if waits else nullcontext():
                terms = torch.stack(self._terms(part))
                self.accelerator.backward((terms * factor.to(terms.dtype)).sum())
            sums += terms.detach().double() * share
        if self.sharded is not None:
            self.sharded.average_scalars()
        sums = sum_over_processes(sums)
        values = [float((sums * factors).sum()), *sums.tolist()]
        self._check(values)
        if self.recipe.optimizer.clip is not None:
            norm = whole(clip(self.trained, self.recipe.optimizer.clip))
            if not math.isfinite(norm.item()):
                raise NotFiniteError(f"the gradient's norm is {norm.item()} while the loss is {values[0]:.4g}")
        self.optimizer.step()
        if self.ema is not None:
            self.gather()
            self.ema.update()
        return values

    def _waiting(self) -> Any:
        if self.sharded is not None:
            return self.sharded.waiting()
        return self.accelerator.no_sync(getattr(self.model, "_orig_mod", self.model))

    def gather(self) -> None:
        """Brings the student's whole weights up to date, where shares of them are trained."""
        if self.sharded is not None:
            self.sharded.gather()

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the optimizer's state as a single process has it; every process must call."""
        return self.optimizer.state_dict() if self.sharded is None else self.sharded.gathered_state(self.optimizer)

    def _parts(self, batch: Sample) -> list[Sample]:
        count = self.recipe.data.accumulate
        if count == 1:
            return [batch]
        chunks = {key: value.chunk(count) for key, value in batch.items()}
        return [{key: chunks[key][i] for key in chunks} for i in range(count)]

    def _terms(self, part: Sample) -> list[Tensor]:
        teacher_output: Any = None
        self.losses.forget()
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_output = self.teacher(part["image"])
        with forward_context(self.accelerator, self.recipe.distributed.sync_norms):
            output = self.model(part["image"])
        return [widen(value) for value in self.losses.values(output, part, teacher_output)]

    def _check(self, values: list[float]) -> None:
        if not all(map(math.isfinite, values)):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.losses.names, values[1:], strict=True))
            raise NotFiniteError(f"the loss is {values[0]:.4g} ({terms})")


def clip(model: nn.Module, largest: float) -> Tensor:
    """Clips the norm of all gradients of a network, of which some may be shares, to ``largest``; returns the norm.

    torch's own clipping does not add up shares and whole tensors.
    """
    from torch.distributed.tensor import DTensor

    grads = [p.grad for p in model.parameters() if p.grad is not None]
    shares = [grad for grad in grads if isinstance(grad, DTensor)]
    if not shares:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    rest = [grad for grad in grads if not isinstance(grad, DTensor)]
    parts = [whole(torch.nn.utils.get_total_norm(group)) for group in (shares, rest) if group]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    factor = (largest / (norm + 1e-6)).clamp(max=1.0).item()
    for grad in grads:
        grad.mul_(factor)
    return norm


def check_compiler(recipe: Recipe) -> None:
    """Looks for what ``compile: true`` needs.

    Raises:
        ConfigError: there is no C++ compiler, or the run is sharded.
    """
    if not recipe.compile:
        return
    if not has_compiler():
        raise ConfigError(
            f"recipe {recipe.name!r} has compile: true, and torch.compile needs a C++ compiler, of which there is none on the "
            "PATH; install g++, or leave compile out"
        )
    if recipe.distributed.strategy == "fsdp":
        raise ConfigError(
            f"recipe {recipe.name!r} has compile: true with distributed.strategy: fsdp, whose layers gather their shares outside "
            "of a graph; use strategy: ddp, or leave compile out"
        )


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether a run's step is compiled: where the recipe asks, and the device has no training kernels of ours.

    On the CPU they are faster than what torch makes of the same step without them (by 1.13 on the scenes' U-Net).
    """
    return recipe.compile and (device.type != "cpu" or recipe.precision == "fp64" or not dense.available())


def compiled(model: nn.Module) -> nn.Module:
    """What calls ``model`` compiled; parameters, names, flags and hooks stay those of ``model``, which is called as ever itself.

    torch compiles at the first call, for minutes where a network is large, and again where a stage binarizes something else.
    Numbers that change as training goes on are inputs of the graph from their second value on.

    Args:
        model: a network, or DistributedDataParallel's wrapper of one.
    """
    # A graph of the stage before would be taken where its guards agree, which do not see the hooks that record features.
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model))


@contextmanager
def stage_step(
    student: nn.Module,
    teacher: nn.Module | None,
    stage: StageSection,
    task: Task,
    *,
    recipe: Recipe,
    accelerator: Accelerator,
    state: Mapping[str, Any] | None,
) -> Iterator[Step]:
    """A stage's step with its optimizer, moving average and hooks, which are there as long as the context lasts.

    Args:
        student: the network to train, in the stage's mode.
        teacher: the full-precision network, or None.
        stage: gives losses, decay and learning rates.
        task: the run's.
        recipe: the run's.
        accelerator: the run's.
        state: a checkpoint of this stage, whose optimizer and average go on; None for a fresh start.

    Raises:
        FormatError: ``state`` is of another network.
    """
    several = accelerator.num_processes > 1
    # First of all, as it may give the parameters new memory, which the moving average reads.
    sharded = Sharded(student, accelerator.device) if several and recipe.distributed.strategy == "fsdp" else None
    model = sharded.model if sharded is not None else accelerator.prepare_model(student) if several else student
    trained = student if sharded is None else sharded.model
    optimizer = build_optimizer(trained, recipe.optimizer, stage)
    ema = Ema(student, recipe.ema) if recipe.ema is not None else None
    if state is not None:
        try:
            moments = state["optimizer"]
            optimizer.load_state_dict(moments if sharded is None else sharded.shared_state(optimizer, moments))
            if ema is not None:
                ema.load_state_dict(state["ema"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise FormatError(
                f"the checkpoint's optimizer or average is not of this network and recipe ({error}); it was edited"
            ) from error
    trained.train()
    try:
        with ExitStack() as stack:
            own = stack.enter_context(Features(trained, stage.layers, "student"))
            theirs = None
            if teacher is not None:
                theirs = stack.enter_context(Features(teacher, stage.layers, "teacher"))
            yield Step(
                student=student,
                model=compiled(model) if compiles(recipe, accelerator.device) else model,
                sharded=sharded,
                teacher=teacher,
                optimizer=optimizer,
                losses=Losses(stage.terms, task, own, theirs),
                ema=ema,
                recipe=recipe,
                accelerator=accelerator,
            )
        if sharded is not None:  # not where a process fails: the others would not be there to gather from
            sharded.gather()
    finally:
        if several and sharded is None:
            # Without accelerate's reference the wrapper goes, and with it its gradient hooks.
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            accelerator.free_memory()
            student.__dict__.pop("_is_accelerate_prepared", None)
        student.zero_grad(set_to_none=True)
