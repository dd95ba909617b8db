"""The training loop of teachers and students; accelerate places it on a CPU, a GPU, or several processes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from bidensify.data import Seeded
from bidensify.errors import TrainingError
from bidensify.models.weights import check_state, load_weights
from bidensify.recipe import Recipe, load_recipe
from bidensify.tasks import Task
from bidensify.train.checkpoint import (
    rng_state,
    save_weights,
    set_rng_state,
    write_checkpoint,
)
from bidensify.train.distributed import gather_objects, make_accelerator
from bidensify.train.evaluation import eval_mode, evaluate
from bidensify.train.folder import RunFolder, RunResult, RunState
from bidensify.train.loaders import batches_per_epoch, check_samples, placed, training_loader
from bidensify.train.logs import RunLog, versions
from bidensify.train.optim import Ema, lr_factor, set_lr
from bidensify.train.selection import Selection
from bidensify.train.stages import Epoch, calibrate_start, calibration_batches, check_stages, epochs, set_mode
from bidensify.train.step import NotFiniteError, Step, stage_step

Sample = dict[str, Tensor]
__all__ = ["RunResult", "finetune"]


def finetune(
    student: nn.Module,
    *,
    teacher: nn.Module | None = None,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    train: Dataset[Sample],
    val: Dataset[Sample],
    run_dir: str | os.PathLike[str],
    resume: bool = False,
    task: Task | None = None,
    quiet: bool = False,
) -> RunResult:
    """Runs the recipe's stages on ``student``; on a full-precision model, ``recipe.for_teacher()`` trains a teacher.

    The student is changed in place and ends with the result's weights, in eval mode, on the device that it came from.

    Args:
        student: the network to train.
        teacher: the full-precision network to distil from; not changed.
        recipe: a recipe, its file, or its mapping.
        train, val: data sets of dicts, bidensify's with their transforms or your own: "image" (float32, (C, H, W),
            normalized) with "mask" (int64, (H, W)) or "depth" (float32, (H, W), metres). ``train`` is wrapped in
            :class:`bidensify.data.Seeded` unless it is one, so that samples depend on (seed, epoch, index) alone.
        run_dir: the run's folder; must not exist, or be empty, unless ``resume``.
        resume: go on from the folder's last checkpoint, to the same result as an unbroken run; a finished run is read.
        task: by default what the recipe builds.
        quiet: print nothing.

    Raises:
        ConfigError: recipe, models and data do not fit one another, or the run folder exists.
        DataError: the data sets' samples have another form.
        FormatError: the checkpoint is of another model or unreadable.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    run = _Run(student, teacher, loaded, train, val, RunFolder(Path(run_dir)), task, quiet)
    return run.go(resume)


class _Run:
    """A run's models, data and state; ``go`` is its life."""

    optimizer: torch.optim.Optimizer
    log: RunLog

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        recipe: Recipe,
        train: Dataset[Sample],
        val: Dataset[Sample],
        folder: RunFolder,
        task: Task | None,
        quiet: bool,
    ) -> None:
        for name, dataset in (("train", train), ("val", val)):
            check_samples(dataset, name)
        check_stages(student, recipe, teacher)
        self.student, self.teacher, self.recipe = student, teacher, recipe
        self.folder, self.val, self.quiet = folder, val, quiet
        self.train = train if isinstance(train, Seeded) else Seeded(train, recipe.seed)
        self.task = task if task is not None else recipe.build_task(getattr(train, "info", None))
        self.accelerator = make_accelerator(recipe)
        self.main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.selection = Selection(recipe, self.task, folder, self.main)
        self.state = RunState()
        self.plan = epochs(recipe.stages)
        self.batches = batches_per_epoch(self.train, recipe)
        self.ema: Ema | None = None

    def go(self, resume: bool) -> RunResult:
        checkpoint = self.folder.inspect(self.recipe, resume)
        if checkpoint is not None:
            check_state(self.student, checkpoint["student"], f"the weights in {str(self.folder.last)!r}")
        finished = self.folder.read_result() if resume else None
        self.accelerator.wait_for_everyone()
        if finished is not None:
            load_weights(self.student, self.folder.weights)
            set_mode(self.student, self.recipe.stages[-1])
            self.student.eval()
            return finished
        if self.main:
            machine = {"device": str(self.device), "processes": self.accelerator.num_processes}
            self.folder.begin(self.recipe, self.student, checkpoint is None, machine)
        with ExitStack() as stack:
            stack.enter_context(placed(self.student, self.device, self.recipe))
            if self.teacher is not None:
                stack.enter_context(placed(self.teacher, self.device, self.recipe))
                stack.enter_context(eval_mode(self.teacher))
            set_seed(self.recipe.seed, device_specific=True)
            if checkpoint is not None:
                self.state = RunState(**checkpoint["state"])
                self.student.load_state_dict(checkpoint["student"])
            step = self.state.step
            self.log = RunLog(self.folder.path, self.recipe, self.main, self.state.log_position, step, self.quiet)
            stack.enter_context(self.log)
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True.*")
            if checkpoint is not None:
                rngs = checkpoint["rng"]  # one per process of the run that wrote it, which may have had fewer
                set_rng_state(rngs[self.accelerator.process_index % len(rngs)], self.device)
                self.log.write("resumed", {"step": step, "versions": versions()})
            return self._train(checkpoint)

    def _train(self, checkpoint: dict[str, Any] | None) -> RunResult:
        state = self.state
        if self.teacher is not None and self.recipe.evaluate.teacher and state.teacher_metrics is None:
            state.teacher_metrics = self._measure(self.teacher)
            value = state.teacher_metrics[self.task.primary]
            self.log.write("teacher", {"metrics": state.teacher_metrics})
            self.log.say(f"teacher  {self.task.primary} {value:.4f}")
        self.log.start_bar(len(self.plan) * self.batches, state.step)
        while state.epoch < len(self.plan):
            epoch = self.plan[state.epoch]
            # At a stage's first batch the checkpoint's optimizer and average are those of the stage before.
            fresh = checkpoint is None or (epoch.within == 0 and state.batch == 0)
            self._stage(epoch.stage, None if fresh else checkpoint)
            checkpoint = None
        return self._finish()

    def _stage(self, number: int, checkpoint: dict[str, Any] | None) -> None:
        stage, state, recipe = self.recipe.stages[number], self.state, self.recipe
        set_mode(self.student, stage)
        if checkpoint is None:
            calibrate_start(self.student, self.train, recipe, self.accelerator, self.plan[state.epoch])
        with stage_step(
            self.student, self.teacher, stage, self.task, recipe=recipe, accelerator=self.accelerator, state=checkpoint
        ) as step:
            self.optimizer, self.ema = step.optimizer, step.ema
            while state.epoch < len(self.plan) and self.plan[state.epoch].stage == number:
                self._epoch(step, self.plan[state.epoch])

    def _epoch(self, step: Step, epoch: Epoch) -> None:
        recipe, state, stage = self.recipe, self.state, self.recipe.stages[epoch.stage]
        loader = training_loader(self.train, recipe, epoch.index, self.accelerator, skip=state.batch)
        names = ["loss", *step.losses.names]
        state.sums = state.sums or [0.0] * len(names)
        title, total = f"{stage.name} {epoch.within + 1}/{stage.epochs}", stage.epochs * self.batches
        self.student.train()
        started, done, lr = time.perf_counter(), 0, 0.0
        for batch in loader:
            lr = stage.lr * lr_factor(stage.schedule, epoch.within * self.batches + state.batch, total, stage.warmup)
            set_lr(self.optimizer, lr)
            try:
                values = step(batch)
            except NotFiniteError as error:
                raise self._stop(str(error), state.step + 1) from error
            state.batch, state.step, done = state.batch + 1, state.step + 1, done + 1
            state.sums = [a + b for a, b in zip(state.sums, values, strict=True)]
            rate = done * recipe.data.batch_size / (time.perf_counter() - started)
            self.log.advance(state.step, title, values[0], rate)
            if state.step % recipe.log.every == 0:
                named = dict(zip(names, values, strict=True))
                place = {"step": state.step, "stage": stage.name, "epoch": epoch.index, "lr": lr}
                self.log.write("step", {**place, "loss": named.pop("loss"), "losses": named})
                self.log.scalars("train", {**named, "loss": values[0], "lr": lr}, state.step)
            if recipe.checkpoint.steps and state.step % recipe.checkpoint.steps == 0 and state.batch < self.batches:
                self._checkpoint()
        seconds = time.perf_counter() - started
        means = dict(zip(names, [value / max(state.batch, 1) for value in state.sums], strict=True))
        place = {"epoch": epoch.index, "stage": stage.name, "step": state.step, "loss": means.pop("loss")}
        rate = done * recipe.data.batch_size / max(seconds, 1e-9)
        self._end_epoch(
            epoch, title, {**place, "losses": means, "lr": lr, "images_per_second": rate, "seconds": seconds}
        )

    def _stop(self, what: str, step: int) -> TrainingError:
        last = self.folder.last
        kept = f"the last good checkpoint is {str(last)!r}" if last.exists() else "no checkpoint was written yet"
        return TrainingError(
            f"training stopped at step {step}: {what}; {kept}. Lower the learning rate, set optimizer.clip, or use "
            "precision: fp32"
        )

    def _end_epoch(self, epoch: Epoch, title: str, record: dict[str, Any]) -> None:
        recipe, state = self.recipe, self.state
        final = epoch.index == len(self.plan) - 1
        text, metrics = f"{title}  loss {record['loss']:.4f}", None
        if (epoch.index + 1) % recipe.evaluate.every == 0 or final:
            with self.ema.swapped() if self.ema is not None else nullcontext():
                metrics = self._measure(self.student)
            shown = f"{self.task.primary} {metrics[self.task.primary]:.4f}"
            text += f"  {shown}"
            self.log.metric(shown)
            self.log.scalars("val", metrics, state.step)
            weights = self.ema.shadow if self.ema is not None else self.student
            self.selection.offer(weights, metrics, epoch, final, state)
        record["metrics"] = metrics
        state.history.append(record)
        self.log.write("epoch", record)
        self.log.say(f"{text}  {record['images_per_second']:.1f} images/s")
        state.epoch, state.batch, state.sums = state.epoch + 1, 0, []
        if (epoch.index + 1) % recipe.checkpoint.every == 0 or final:
            self._checkpoint()

    def _measure(self, model: nn.Module) -> dict[str, float]:
        data = self.recipe.data
        return evaluate(
            model,
            self.task,
            self.val,
            batch_size=data.eval_batch_size or max(1, data.batch_size // self.accelerator.num_processes),
            workers=data.workers,
            precision=self.recipe.precision,
            channels_last=self.recipe.channels_last,
            accelerator=self.accelerator,
        )

    def _checkpoint(self) -> None:
        rngs = gather_objects(rng_state(self.device))
        if not self.main:
            return
        if not all(bool(torch.isfinite(p).all()) for p in self.student.parameters()):
            raise self._stop("a weight is not finite", self.state.step)
        self.state.log_position = self.log.position
        write_checkpoint(
            self.folder.last,
            {
                "student": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict() if self.ema is not None else None,
                "rng": rngs,
                "state": asdict(self.state),
            },
        )
        self.folder.clean(self.state.best_epoch)

    def _finish(self) -> RunResult:
        recipe, state = self.recipe, self.state
        self.accelerator.wait_for_everyone()
        load_weights(self.student, self.folder.best(state.best_epoch))
        set_mode(self.student, recipe.stages[-1])
        metrics, recalibrated = state.best_metrics, False
        if recipe.ema is not None and recipe.calibrate.at_end and recipe.calibrate.batches:
            batches = calibration_batches(self.student, self.train, recipe, self.device, len(self.plan))
            metrics, record = self.selection.recalibrate(self.student, batches, metrics, self._measure)
            self.log.write("recalibration", record)
            recalibrated = record["kept"]
        self.student.eval()
        result = RunResult(
            self.folder.path,
            metrics,
            state.history,
            state.best_epoch,
            self.task.primary,
            state.step,
            recalibrated,
            state.teacher_metrics,
        )
        if self.main:
            save_weights(self.student, self.folder.weights, single=recipe.precision == "fp64")
            self.folder.write_result(recipe.name, result)
        self.accelerator.wait_for_everyone()
        self.log.say(f"{recipe.name}: {self.task.primary} {metrics[self.task.primary]:.4f} (epoch {state.best_epoch})")
        return result
