"""The training loop of teachers and students; accelerate places it on a CPU, a GPU, or several processes."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from bidensify.errors import TrainingError
from bidensify.models.weights import load_weights
from bidensify.nn import set_progress
from bidensify.recipe import Recipe
from bidensify.tasks import Task
from bidensify.train.distributed import gather_objects
from bidensify.train.evaluation import evaluate
from bidensify.train.loaders import batches_per_epoch, training_loader
from bidensify.train.optim import Ema, lr_factor, set_lr
from bidensify.train.rundir.checkpoint import rng_state, save_weights, write_checkpoint
from bidensify.train.rundir.folder import RunFolder, RunResult, RunState
from bidensify.train.rundir.logs import RunLog
from bidensify.train.selection import Selection
from bidensify.train.stages import Epoch, calibrate_start, calibration_batches, epochs, set_mode
from bidensify.train.step import NotFiniteError, Step, stage_step

Sample = dict[str, Tensor]
__all__ = ["Loop"]


class Loop:
    """A run's stages and epochs, from where its state says to its result.

    Args:
        student, teacher: the networks, on the run's device; the teacher in eval mode.
        recipe, task, train, val: what :func:`bidensify.finetune` was given.
        accelerator: the run's.
        folder, log: where it writes.
    """

    optimizer: torch.optim.Optimizer
    step: Step

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        recipe: Recipe,
        task: Task,
        train: Dataset[Sample],
        val: Dataset[Sample],
        *,
        accelerator: Accelerator,
        folder: RunFolder,
        log: RunLog,
    ) -> None:
        self.student, self.teacher, self.recipe, self.task = student, teacher, recipe, task
        self.train, self.val, self.folder, self.log = train, val, folder, log
        self.accelerator, self.main, self.device = accelerator, accelerator.is_main_process, accelerator.device
        self.selection = Selection(recipe, task, folder, self.main)
        self.plan = epochs(recipe.stages)
        self.batches = batches_per_epoch(train, recipe)
        self.state = RunState()
        self.ema: Ema | None = None

    def run(self, state: RunState, checkpoint: dict[str, Any] | None) -> RunResult:
        """Trains from ``state`` on, with the optimizer and average of ``checkpoint`` where there is one."""
        self.state = state
        if self.folder.longer:
            self._tell_longer()
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

    def _tell_longer(self) -> None:
        """Says what the learning rate does where the run goes on for more epochs than it was meant to have."""
        state = self.state
        if state.epoch >= len(self.plan) or not state.history:
            return
        epoch = self.plan[state.epoch]
        before, stage = state.history[-1], self.recipe.stages[epoch.stage]
        now = self._lr(epoch, state.batch)
        self.log.say(
            f"stage {stage.name!r} goes on as one of {stage.epochs} epochs: the learning rate, {before['lr']:.3g} at the end of "
            f"the epoch before, is {now:.3g} from here, where the longer schedule has it"
        )

    def _lr(self, epoch: Epoch, batch: int) -> float:
        """The learning rate of a step, by its place in its stage."""
        stage = self.recipe.stages[epoch.stage]
        total = stage.epochs * self.batches
        return stage.lr * lr_factor(stage.schedule, epoch.within * self.batches + batch, total, stage.warmup)

    def _stage(self, number: int, checkpoint: dict[str, Any] | None) -> None:
        stage, state, recipe = self.recipe.stages[number], self.state, self.recipe
        set_mode(self.student, stage)
        if checkpoint is None:
            calibrate_start(self.student, self.teacher, self.train, recipe, self.accelerator, self.plan[state.epoch])
        with stage_step(
            self.student, self.teacher, stage, self.task, recipe=recipe, accelerator=self.accelerator, state=checkpoint
        ) as step:
            self.step, self.optimizer, self.ema = step, step.optimizer, step.ema
            while state.epoch < len(self.plan) and self.plan[state.epoch].stage == number:
                self._epoch(step, self.plan[state.epoch])

    def _epoch(self, step: Step, epoch: Epoch) -> None:
        recipe, state, stage = self.recipe, self.state, self.recipe.stages[epoch.stage]
        loader = training_loader(self.train, recipe, epoch.index, self.accelerator, skip=state.batch)
        names = ["loss", *step.losses.names]
        state.sums = state.sums or [0.0] * len(names)
        title = f"{stage.name} {epoch.within + 1}/{stage.epochs}"
        step.trained.train()
        before, done, started = state.seconds, state.batch, time.perf_counter()
        for batch in loader:
            lr = self._lr(epoch, state.batch)
            set_lr(self.optimizer, lr)
            self._progress()
            try:
                values = step(batch)
            except NotFiniteError as error:
                raise self._stop(str(error), state.step + 1) from error
            state.batch, state.step = state.batch + 1, state.step + 1
            state.seconds = before + time.perf_counter() - started
            state.sums = [a + b for a, b in zip(state.sums, values, strict=True)]
            rate = (state.batch - done) * recipe.data.batch_size / (time.perf_counter() - started)
            self.log.advance(state.step, title, values[0], rate)
            if state.step % recipe.log.every == 0:
                named = dict(zip(names, values, strict=True))
                place = {"step": state.step, "stage": stage.name, "epoch": epoch.index, "lr": lr}
                self.log.write("step", {**place, "loss": named.pop("loss"), "losses": named})
                self.log.scalars("train", {**named, "loss": values[0], "lr": lr}, state.step)
            if recipe.checkpoint.steps and state.step % recipe.checkpoint.steps == 0 and state.batch < self.batches:
                self._checkpoint()
        means = dict(zip(names, [value / max(state.batch, 1) for value in state.sums], strict=True))
        place = {"epoch": epoch.index, "stage": stage.name, "step": state.step, "loss": means.pop("loss")}
        rate = state.batch * recipe.data.batch_size / max(state.seconds, 1e-9)
        lr = self._lr(epoch, self.batches - 1)
        speed = {"images_per_second": rate, "seconds": state.seconds}
        self._end_epoch(epoch, title, {**place, "losses": means, "lr": lr, **speed})

    def _progress(self) -> None:
        """Tells parts that change as training goes on how far it has come."""
        progress = self.state.step / (len(self.plan) * self.batches)
        set_progress(self.student, progress)
        if self.step.trained is not self.student:
            set_progress(self.step.trained, progress)

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
            # Evaluation may fail for reasons of its own; the epoch's training is not lost with it. A resume from here
            # evaluates again, to the same figures.
            self._checkpoint()
            self._progress()
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
        state.epoch, state.batch, state.sums, state.seconds = state.epoch + 1, 0, [], 0.0
        if final or (metrics is None and (epoch.index + 1) % recipe.checkpoint.every == 0):
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
            views=self.recipe.views(),
        )

    def _checkpoint(self) -> None:
        rngs = gather_objects(rng_state(self.device))
        self.step.gather()
        moments = self.step.optimizer_state()
        if not self.main:
            return
        if not all(bool(torch.isfinite(p).all()) for p in self.student.parameters()):
            raise self._stop("a weight is not finite", self.state.step)
        self.state.log_position = self.log.position
        write_checkpoint(
            self.folder.last,
            {
                "student": self.student.state_dict(),
                "optimizer": moments,
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
        set_progress(self.student, 1.0)
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
        self.log.say(
            f"{recipe.name}: {self.task.primary} {metrics[self.task.primary]:.4f} (epoch {state.best_epoch + 1})"
        )
        return result
