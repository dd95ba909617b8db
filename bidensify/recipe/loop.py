"""The training loop of teachers and students; accelerate places it on a CPU, a GPU, or several processes."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from bidensify._files import atomic_write
from bidensify.errors import ConfigError, FormatError, TrainingError
from bidensify.nn import calibrate
from bidensify.recipe.checkpoint import (
    check_state,
    load_weights,
    read_checkpoint,
    rng_state,
    save_weights,
    set_rng_state,
    write_checkpoint,
)
from bidensify.recipe.distributed import forward_context, make_accelerator, sum_over_processes
from bidensify.recipe.evaluation import evaluate
from bidensify.recipe.features import Features
from bidensify.recipe.load import load_recipe
from bidensify.recipe.loaders import to_device, training_loader
from bidensify.recipe.logs import RunLog, versions, write_json
from bidensify.recipe.losses import Losses
from bidensify.recipe.optim import Ema, build_optimizer, lr_factor, set_lr
from bidensify.recipe.schema import Recipe
from bidensify.recipe.stages import Epoch, calibrate_start, calibration_batches, check_stages, epochs, set_mode
from bidensify.tasks import Task

Sample = dict[str, Tensor]


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        run_dir: its folder; ``model.safetensors`` in it holds the weights that ``metrics`` were measured on.
        metrics: the task's metrics on the validation data.
        history: one record per epoch: losses, learning rate, speed and, where measured, metrics.
        best_epoch: the epoch (over the whole run, from 0) whose weights were chosen.
        primary: the metric that chose.
        recalibrated: whether re-estimated norm statistics were better and are in the weights.
    """

    run_dir: Path
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    best_epoch: int
    primary: str
    recalibrated: bool = False


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
    """Runs the recipe's stages on ``student``; with a full-precision model and ``recipe.for_teacher()`` it trains a teacher.

    The student is changed in place and ends with the result's weights, in eval mode, on the device it came from.

    Args:
        student: the network to train.
        teacher: the full-precision network to distil from; not changed.
        recipe: a recipe, its file, or its mapping.
        train, val: data sets with their transforms; ``train`` is wrapped in :class:`bidensify.data.Seeded` unless it is
            one, so that samples depend on (seed, epoch, index) alone.
        run_dir: the run's folder; must not exist, or be empty, unless ``resume``.
        resume: go on from the folder's last checkpoint, to the same result as an unbroken run; a finished run is read.
        task: by default what the recipe builds.
        quiet: print nothing.

    Raises:
        ConfigError: recipe, models and data do not fit one another, or the run folder exists.
        FormatError: the checkpoint is of another model or unreadable.
        TrainingError: the loss is not finite.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return _Run(student, teacher, loaded, train, val, Path(run_dir), task, quiet).go(resume)


@dataclass
class _State:
    """Where a run is, beyond weights: saved in each checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = -1
    best_metrics: dict[str, float] = field(default_factory=dict)
    sums: list[float] = field(default_factory=list)
    steps_summed: int = 0
    log_position: int = 0


class _Run:
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        recipe: Recipe,
        train: Dataset[Sample],
        val: Dataset[Sample],
        run_dir: Path,
        task: Task | None,
        quiet: bool,
    ) -> None:
        from bidensify.data import Seeded

        check_stages(student, recipe, teacher)
        self.recipe, self.folder, self.quiet = recipe, run_dir, quiet
        self.student, self.teacher = student, teacher
        self.train = train if isinstance(train, Seeded) else Seeded(train, recipe.seed)  # type: ignore[arg-type]
        self.val = val
        self.task = task if task is not None else recipe.build_task(getattr(train, "info", None))
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        self.state = _State()
        self.plan = epochs(recipe.stages)
        self.batches = len(self.train) // recipe.data.batch_size

    # --- the run's folder

    @property
    def _last(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    def _best(self, epoch: int) -> Path:
        return self.folder / "checkpoints" / f"best-{epoch:04d}.safetensors"

    def _open_folder(self, resume: bool) -> dict[str, Any] | None:
        """Checks the folder, reads the checkpoint to resume from, and writes what is known before training."""
        exists = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        self.accelerator.wait_for_everyone()
        if exists and not resume:
            raise ConfigError(
                f"the run folder {str(self.folder)!r} exists and is not empty; choose another, remove it, or resume the run"
            )
        checkpoint = None
        if exists:
            self._same_recipe()
            checkpoint = read_checkpoint(self._last) if self._last.exists() else None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / "recipe.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False), encoding="utf-8")
            plan = getattr(self.student, "bidensify_plan", None)
            if plan is not None:
                write_json(self.folder / "plan.json", plan.to_dict())
            if checkpoint is None:
                write_json(self.folder / "versions.json", versions())
        return checkpoint

    def _same_recipe(self) -> None:
        file = self.folder / "recipe.yaml"
        if not file.is_file():
            raise ConfigError(f"{str(self.folder)!r} is not a run folder (it has no recipe.yaml); it cannot be resumed")
        old, new = load_recipe(file).to_dict(), self.recipe.to_dict()
        changed = [path for path in _differences(old, new) if not path.startswith(_FREE)]
        if changed:
            raise ConfigError(
                f"the run in {str(self.folder)!r} has another recipe; it differs in {', '.join(changed[:5])}. Resume with "
                "the run's own recipe.yaml, or choose another run folder"
            )

    # --- the run

    def go(self, resume: bool) -> RunResult:
        checkpoint = self._open_folder(resume)
        if checkpoint is not None:
            check_state(self.student, checkpoint["student"], f"the checkpoint's weights in {str(self.folder)!r}")
        result = self.folder / "result.json"
        if resume and result.exists():
            return self._finished(result)
        home = next((p.device for p in self.student.parameters()), torch.device("cpu"))
        set_seed(self.recipe.seed)
        memory = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        self.student.to(self.device, memory_format=memory)  # type: ignore[call-overload]
        teacher_mode = self.teacher.training if self.teacher is not None else False
        if self.teacher is not None:
            self.teacher.to(self.device, memory_format=memory).eval()  # type: ignore[call-overload]
        try:
            return self._train(checkpoint)
        finally:
            self.student.to(home, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            if self.teacher is not None:
                self.teacher.to(home, memory_format=torch.contiguous_format).train(teacher_mode)  # type: ignore[call-overload]

    def _finished(self, result: Path) -> RunResult:
        load_weights(self.student, self.folder / "model.safetensors")
        set_mode(self.student, self.recipe.stages[-1])
        self.student.eval()
        data = json.loads(result.read_text(encoding="utf-8"))
        keys = ("metrics", "history", "best_epoch", "primary", "recalibrated")
        return RunResult(self.folder, **{key: data[key] for key in keys})

    def _train(self, checkpoint: dict[str, Any] | None) -> RunResult:
        if checkpoint is not None:
            self.state = _State(**checkpoint["state"])
            self.student.load_state_dict(checkpoint["student"])
        state = self.state
        main = self.accelerator.is_main_process
        self.log = RunLog(
            self.folder, self.recipe, main, position=state.log_position, step=state.step, quiet=self.quiet
        )
        with self.log, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True.*")
            self.log.start_bar(len(self.plan) * self.batches, state.step, "")
            while state.epoch < len(self.plan):
                self._stage(self.plan[state.epoch].stage, checkpoint)
                checkpoint = None
            return self._finish()

    def _stage(self, number: int, checkpoint: dict[str, Any] | None) -> None:
        stage, state = self.recipe.stages[number], self.state
        set_mode(self.student, stage)
        if checkpoint is None:
            calibrate_start(self.student, self.train, self.recipe, self.accelerator, self.plan[state.epoch])
        self.optimizer = build_optimizer(self.student, self.recipe.optimizer, stage)
        self.ema = Ema(self.student, self.recipe.ema) if self.recipe.ema is not None else None
        if checkpoint is not None:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(checkpoint["ema"])
        self.student.train()
        model = self.accelerator.prepare_model(self.student) if self.accelerator.num_processes > 1 else self.student
        layers = [] if stage.losses.cwd is None else list(stage.losses.cwd.layers)
        layers += [] if stage.losses.features is None else stage.losses.features.layers
        try:
            with Features(self.student, layers, "student") as own, Features(
                self.teacher if self.teacher is not None else self.student, layers, "teacher"
            ) as theirs:
                self.losses = Losses(stage.losses, self.task, own, theirs)
                while state.epoch < len(self.plan) and self.plan[state.epoch].stage == number:
                    rng = checkpoint["rng"][self.accelerator.process_index] if checkpoint is not None else None
                    checkpoint = None
                    self._epoch(model, self.plan[state.epoch], rng)
        finally:
            if self.accelerator.num_processes > 1:
                self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                self.accelerator._models.clear()
                self.student.__dict__.pop("_is_accelerate_prepared", None)
            self.student.zero_grad(set_to_none=True)

    def _epoch(self, model: nn.Module, epoch: Epoch, rng: dict[str, Any] | None) -> None:
        recipe, state, stage = self.recipe, self.state, self.recipe.stages[epoch.stage]
        loader = training_loader(self.train, recipe, epoch.index, self.accelerator, skip=state.batch)
        if not state.sums:
            state.sums, state.steps_summed = [0.0] * (1 + len(self.losses.names)), 0
        title = f"{stage.name} {epoch.within + 1}/{stage.epochs}"
        total = stage.epochs * self.batches
        self.student.train()
        iterator = iter(loader)
        if rng is not None:
            set_rng_state(rng, self.device)
        started, steps = time.perf_counter(), 0
        for batch in iterator:
            within = epoch.within * self.batches + state.batch
            lr = stage.lr * lr_factor(stage.schedule, within, total, stage.warmup)
            set_lr(self.optimizer, lr)
            values = self._step(model, batch)
            state.batch, state.step, steps = state.batch + 1, state.step + 1, steps + 1
            state.sums = [a + b for a, b in zip(state.sums, values, strict=True)]
            state.steps_summed += 1
            rate = steps * recipe.data.batch_size / (time.perf_counter() - started)
            self.log.advance(state.step, title, values[0], rate)
            if state.step % recipe.log.every == 0:
                terms = dict(zip(self.losses.names, values[1:], strict=True))
                place = {"step": state.step, "stage": stage.name, "epoch": epoch.index, "lr": lr}
                self.log.write("step", {**place, "loss": values[0], "losses": terms})
                self.log.scalars({"train/loss": values[0], "train/lr": lr}, state.step)
                self.log.scalars({f"train/{name}": value for name, value in terms.items()}, state.step)
            if recipe.checkpoint.steps and state.step % recipe.checkpoint.steps == 0 and state.batch < self.batches:
                self._checkpoint()
        seconds = time.perf_counter() - started
        self._end_epoch(epoch, title, lr if steps else 0.0, seconds, steps * recipe.data.batch_size / max(seconds, 1e-9))

    def _step(self, model: nn.Module, batch: Sample) -> list[float]:
        """One optimizer step on this process's part of a global batch; returns the global loss and its terms."""
        recipe, accelerator = self.recipe, self.accelerator
        batch = to_device(batch, self.device, recipe.channels_last)
        parts = [batch]
        if recipe.data.accumulate > 1:
            chunks = {key: value.chunk(recipe.data.accumulate) for key, value in batch.items()}
            parts = [{key: chunks[key][i] for key in chunks} for i in range(recipe.data.accumulate)]
        weights = [self.losses.weights(part) for part in parts]
        total = sum_over_processes(torch.stack(weights).sum(0)).clamp(min=1e-12)
        factors = torch.tensor(list(self.losses.factors.values()), dtype=torch.float64, device=total.device)
        sums = torch.zeros_like(total)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            last = index == len(parts) - 1
            with accelerator.no_sync(model) if not last and accelerator.num_processes > 1 else _nothing():
                with torch.no_grad(), accelerator.autocast():
                    teacher_output = self.teacher(part["image"]) if self._distils else None
                with forward_context(accelerator):
                    output = model(part["image"])
                terms = torch.stack(self.losses.values(output, part, teacher_output))
                shares = weight / total
                # DDP averages gradients over processes; times their number makes it the sum that shares call for.
                loss = (terms * (factors * shares * accelerator.num_processes).to(terms.dtype)).sum()
                accelerator.backward(loss)
            sums += terms.detach().double() * shares
        sums = sum_over_processes(sums)
        values = [float((sums * factors).sum()), *sums.tolist()]
        if not all(map(_finite, values)):
            self._stop(values, "the loss")
        if recipe.optimizer.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), recipe.optimizer.clip)
            if not bool(torch.isfinite(norm)):
                self._stop(values, "the gradient")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return values

    @property
    def _distils(self) -> bool:
        return self.losses.section.distils

    def _stop(self, values: list[float], what: str) -> None:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(["loss", *self.losses.names], values, strict=True))
        kept = f"the last good checkpoint is {self._last}" if self._last.exists() else "no checkpoint was written yet"
        raise TrainingError(
            f"{what} is not finite at step {self.state.step + 1} ({terms}); {kept}. Lower the learning rate, set "
            "optimizer.clip, or use precision: fp32"
        )

    def _end_epoch(self, epoch: Epoch, title: str, lr: float, seconds: float, rate: float) -> None:
        recipe, state, stage = self.recipe, self.state, self.recipe.stages[epoch.stage]
        means = [value / max(state.steps_summed, 1) for value in state.sums]
        record: dict[str, Any] = {
            "epoch": epoch.index,
            "stage": stage.name,
            "step": state.step,
            "loss": means[0],
            "losses": dict(zip(self.losses.names, means[1:], strict=True)),
            "lr": lr,
            "images_per_second": rate,
            "seconds": seconds,
            "metrics": None,
        }
        text = f"{title}  loss {means[0]:.4f}"
        final = epoch.index == len(self.plan) - 1
        if (epoch.index + 1) % recipe.evaluate.every == 0 or final:
            metrics = self._evaluate()
            record["metrics"] = metrics
            value = metrics[self.task.primary]
            text += f"  {self.task.primary} {value:.4f}"
            self.log.metric(f"{self.task.primary} {value:.4f}")
            self.log.scalars({f"val/{name}": number for name, number in metrics.items()}, state.step)
            self._select(epoch, metrics, final)
        state.history.append(record)
        self.log.write("epoch", record)
        self.log.say(f"{text}  {rate:.1f} images/s")
        state.epoch, state.batch, state.sums = state.epoch + 1, 0, []
        if (epoch.index + 1) % recipe.checkpoint.every == 0 or final:
            self._checkpoint()

    def _evaluate(self) -> dict[str, float]:
        with self.ema.swapped() if self.ema is not None else _nothing():
            return self._measure()

    def _measure(self) -> dict[str, float]:
        data = self.recipe.data
        return evaluate(
            self.student,
            self.task,
            self.val,
            batch_size=data.eval_batch_size or max(1, data.batch_size // self.accelerator.num_processes),
            workers=data.workers,
            precision=self.recipe.precision,
            channels_last=self.recipe.channels_last,
            accelerator=self.accelerator,
        )

    def _select(self, epoch: Epoch, metrics: dict[str, float], final: bool) -> None:
        """Keeps the weights if they are the best so far among those binarized as the result will be."""
        state, stages = self.state, self.recipe.stages
        if stages[epoch.stage].binarize != stages[-1].binarize:
            return
        value = metrics[self.task.primary]
        better = state.best is None or (value > state.best if self.task.higher_is_better else value < state.best)
        if final if self.recipe.evaluate.select == "last" else better:
            state.best, state.best_epoch, state.best_metrics = value, epoch.index, metrics
            if self.accelerator.is_main_process:
                save_weights(self.ema.shadow if self.ema is not None else self.student, self._best(epoch.index))

    def _checkpoint(self) -> None:
        rngs: list[Any] = [rng_state(self.device)]
        if self.accelerator.num_processes > 1:
            gathered: list[Any] = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(gathered, rngs[0])
            rngs = gathered
        if not self.accelerator.is_main_process:
            return
        if not all(bool(torch.isfinite(p).all()) for p in self.student.parameters()):
            self._stop([], "a weight")
        self.state.log_position = self.log.position
        write_checkpoint(
            self._last,
            {
                "student": self.student.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict() if self.ema is not None else None,
                "rng": rngs,
                "state": asdict(self.state),
            },
        )
        # Only now is the former best not needed: a run that resumes reads what last.pt names.
        for file in self._last.parent.glob("best-*.safetensors"):
            if file != self._best(self.state.best_epoch):
                file.unlink()

    def _finish(self) -> RunResult:
        recipe, state = self.recipe, self.state
        if state.best_epoch < 0:
            raise TrainingError(f"no epoch was evaluated in {str(self.folder)!r}")
        self.accelerator.wait_for_everyone()
        load_weights(self.student, self._best(state.best_epoch))
        set_mode(self.student, recipe.stages[-1])
        metrics, recalibrated = state.best_metrics, False
        if recipe.ema is not None and recipe.calibrate.at_end and recipe.calibrate.batches:
            batches = calibration_batches(self.train, recipe, self.device, recipe.calibrate.batches, len(self.plan))
            kept = {key: value.clone() for key, value in self.student.state_dict().items()}
            calibrate(self.student, batches, thresholds=False, norms=True)
            again = self._measure()
            value, best = again[self.task.primary], metrics[self.task.primary]
            recalibrated = value > best if self.task.higher_is_better else value < best
            self.log.write("recalibration", {"before": metrics, "after": again, "kept": recalibrated})
            if recalibrated:
                metrics = again
            else:
                self.student.load_state_dict(kept)
        self.student.eval()
        result = RunResult(self.folder, metrics, state.history, state.best_epoch, self.task.primary, recalibrated)
        if self.accelerator.is_main_process:
            save_weights(self.student, self.folder / "model.safetensors")
            write_json(
                self.folder / "result.json",
                {
                    "name": recipe.name,
                    "primary": self.task.primary,
                    "metrics": metrics,
                    "best_epoch": state.best_epoch,
                    "recalibrated": recalibrated,
                    "steps": state.step,
                    "history": state.history,
                },
            )
        self.accelerator.wait_for_everyone()
        self.log.say(f"{recipe.name}: {self.task.primary} {metrics[self.task.primary]:.4f} at epoch {state.best_epoch}")
        return result


# What may differ when a run is resumed: it does not change the result.
_FREE = ("data.workers", "data.root", "data.eval_batch_size", "log.", "checkpoint.", "device", "teacher.weights")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted({*old, *new}):
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [p for i, (a, b) in enumerate(zip(old, new, strict=True)) for p in _differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [path]


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


__all__ = ["FormatError", "RunResult", "finetune"]
