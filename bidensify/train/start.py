"""A run: what is given is looked at, the folder is begun or gone on with, and the loop does the rest."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from bidensify._util.fingerprint import weights_fingerprint
from bidensify._util.wrappers import unwrap
from bidensify.data import Seeded
from bidensify.errors import DataError
from bidensify.models.weights import check_state, load_weights
from bidensify.recipe import Recipe, load_recipe
from bidensify.tasks import Task
from bidensify.train.check import check_disk, check_start, disk_needed
from bidensify.train.distributed import make_accelerator
from bidensify.train.evaluation import eval_mode, evaluate
from bidensify.train.loaders import batches_per_epoch, check_samples, placed, training_loader
from bidensify.train.loop import Loop
from bidensify.train.rundir.checkpoint import set_rng_state
from bidensify.train.rundir.folder import RunFolder, RunResult, RunState
from bidensify.train.rundir.logs import RunLog, versions
from bidensify.train.stages import check_stages, epochs, set_mode
from bidensify.train.step import stage_step

Sample = dict[str, Tensor]
__all__ = ["finetune"]


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

    The student is changed in place and ends with the result's weights, in eval mode, on the device that it came from. Both
    networks are looked for inside ``torch.compile``, DataParallel and moving averages, and train as they are in there.

    Args:
        student: the network to train.
        teacher: the full-precision network to distil from; not changed.
        recipe: a recipe, its file, or its mapping.
        train, val: data sets of dicts, bidensify's with their transforms or your own: "image" (floating point, (C, H, W),
            normalized) with "mask" (int64, (H, W)) or "depth" (float32, (H, W), metres). ``train`` is wrapped in
            :class:`bidensify.data.Seeded` unless it is one, so that samples depend on (seed, epoch, index) alone.
        run_dir: the run's folder; must not exist, or be empty, unless ``resume``.
        resume: go on from the folder's last checkpoint, to the same result as an unbroken run; a finished run is read,
            unless the recipe has more epochs than it had.
        task: by default what the recipe builds.
        quiet: print nothing.

    Raises:
        ConfigError: recipe, models and data do not fit one another (see :func:`bidensify.train.check.check_start`), the
            run folder exists, or is that of a run with another recipe, teacher or data.
        DataError: the data sets' samples have another form.
        FormatError: the checkpoint is of another model or unreadable.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    for name, dataset in (("train", train), ("val", val)):
        check_samples(dataset, name)
    student = unwrap(student, "the student")
    teacher = unwrap(teacher, "the teacher") if teacher is not None else None
    check_stages(student, recipe, teacher)
    task = task if task is not None else recipe.build_task(getattr(train, "info", None))
    train = train if isinstance(train, Seeded) else Seeded(train, recipe.seed)
    batches_per_epoch(train, recipe)
    accelerator, folder = make_accelerator(recipe), RunFolder(Path(run_dir))
    main, device = accelerator.is_main_process, accelerator.device

    checkpoint, state = folder.inspect(recipe, resume), RunState()
    inputs = _inputs(recipe, teacher, train, val)
    if checkpoint is not None:
        state = RunState.read(checkpoint["state"], folder.last)
        check_state(student, checkpoint["student"], f"the weights in {str(folder.last)!r}")
        folder.check_inputs(inputs)
    finished = folder.read_result(len(epochs(recipe.stages))) if resume else None
    accelerator.wait_for_everyone()
    if finished is not None:
        load_weights(student, folder.weights)
        set_mode(student, recipe.stages[-1])
        student.eval()
        return finished
    if main:
        check_disk(folder.path, disk_needed(student, recipe))
    with ExitStack() as stack:
        stack.enter_context(placed(student, device, recipe))
        if teacher is not None:
            stack.enter_context(placed(teacher, device, recipe))
            stack.enter_context(eval_mode(teacher))
        notes = check_start(student, teacher, recipe, task, train, val, accelerator)
        if main:
            machine = {"device": str(device), "processes": accelerator.num_processes}
            folder.begin(recipe, student, checkpoint is None, machine, inputs)
        set_seed(recipe.seed, device_specific=True)
        log = stack.enter_context(RunLog(folder.path, recipe, main, state.log_position, state.step, quiet))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True.*")
        for text in notes:
            log.say(f"note: {text}")
        if checkpoint is not None:
            student.load_state_dict(checkpoint["student"])
            rngs = checkpoint["rng"]  # one per process of the run that wrote it, which may have had fewer
            set_rng_state(rngs[accelerator.process_index % len(rngs)], device)
            log.write("resumed", {"step": state.step, "versions": versions()})
        loop = Loop(student, teacher, recipe, task, train, val, accelerator=accelerator, folder=folder, log=log)
        return loop.run(state, checkpoint)


def try_start(
    student: nn.Module,
    teacher: nn.Module | None,
    recipe: Recipe,
    train: Dataset[Sample],
    val: Dataset[Sample],
    *,
    timed: bool = False,
) -> tuple[list[str], float]:
    """Does what :func:`finetune` does before its first step, writes nothing, and trains nothing unless ``timed``.

    Args:
        student, teacher, recipe, train, val: as for :func:`finetune`.
        timed: take two steps of the last stage (which change the student), and measure.

    Returns:
        What is probably not meant, and the seconds that an epoch will take with its evaluation (0 if not ``timed``).

    Raises:
        BidensifyError: what the run would be refused for.
    """
    for name, dataset in (("train", train), ("val", val)):
        check_samples(dataset, name)
    check_stages(student, recipe, teacher)
    task = recipe.build_task(getattr(train, "info", None))
    train, accelerator, seconds = Seeded(train, recipe.seed), make_accelerator(recipe), 0.0
    batches = batches_per_epoch(train, recipe)
    with ExitStack() as stack:
        stack.enter_context(placed(student, accelerator.device, recipe))
        if teacher is not None:
            stack.enter_context(placed(teacher, accelerator.device, recipe))
            stack.enter_context(eval_mode(teacher))
        notes = check_start(student, teacher, recipe, task, train, val, accelerator)
        if timed:
            stage = recipe.stages[-1]
            set_mode(student, stage)
            loader = iter(training_loader(train, recipe, 0, accelerator))
            with stage_step(student, teacher, stage, task, recipe=recipe, accelerator=accelerator, state=None) as step:
                step(next(loader))
                if batches == 1:  # there is no second one; the same again takes as long
                    loader = iter(training_loader(train, recipe, 0, accelerator))
                started = time.perf_counter()
                step(next(loader))
                seconds = batches * (time.perf_counter() - started)
            size = min(recipe.data.eval_batch_size or recipe.data.batch_size, len(val))  # type: ignore[arg-type]
            few, started = Subset(val, range(size)), time.perf_counter()
            with suppress(DataError):  # these images may have nothing to measure; check_start has looked
                evaluate(
                    student,
                    task,
                    few,
                    batch_size=size,
                    precision=recipe.precision,
                    channels_last=recipe.channels_last,
                    views=recipe.views(),
                )
            shares = len(val) / size / recipe.evaluate.every  # type: ignore[arg-type]
            seconds += shares * (time.perf_counter() - started)
    return notes, seconds


def _inputs(recipe: Recipe, teacher: nn.Module | None, train: Dataset[Sample], val: Dataset[Sample]) -> dict[str, Any]:
    """What decides a run beside its recipe, for the record in its folder."""
    record = None
    if teacher is not None:
        weights = recipe.teacher.weights if recipe.teacher is not None else None
        record = {"weights": weights, "fingerprint": weights_fingerprint(teacher)}
    return {"teacher": record, "train": _data_record(train), "val": _data_record(val)}


def _data_record(dataset: Any) -> dict[str, Any]:
    """What tells one data set from another: how many samples, and their names where it has names."""
    inner = dataset
    while not hasattr(inner, "name_of") and hasattr(inner, "dataset"):
        inner = inner.dataset
    record: dict[str, Any] = {"samples": len(dataset)}
    if hasattr(inner, "name_of") and len(inner) == len(dataset):
        names = "\n".join(inner.name_of(index) for index in range(len(inner)))
        record["stems"] = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
    return record
