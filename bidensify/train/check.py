"""What a run needs, looked at before it starts: labels, samples, networks, losses, evaluation, disk.

Whatever a run would trip over after hours is refused here, before its folder is made.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from bidensify._util.seeding import seeded
from bidensify.data import Seeded, check_dataset
from bidensify.data.batches import collate, to_device
from bidensify.errors import BidensifyError, ConfigError, DataError
from bidensify.losses import Features, Losses
from bidensify.recipe import Recipe
from bidensify.tasks import Task
from bidensify.train.distributed import forward_context
from bidensify.train.evaluation import eval_mode, evaluate
from bidensify.train.stages import set_mode
from bidensify.train.step import compiles

Sample = dict[str, Tensor]
__all__ = ["RunCheck", "check_disk", "check_start", "disk_needed"]


def check_start(
    student: nn.Module,
    teacher: nn.Module | None,
    recipe: Recipe,
    task: Task,
    train: Dataset[Sample],
    val: Dataset[Sample],
    accelerator: Accelerator,
) -> list[str]:
    """Sends one small batch through everything that a run does with its data and networks, and reads all labels.

    The networks must be where the run has them; they and all generators of the CPU are left as they were.

    Returns:
        What is probably not meant, to be told.

    Raises:
        ConfigError: a network does not run on the samples, a batch is too small for a norm, a loss cannot work on what
            the networks give, or evaluation cannot measure them.
        DataError: samples that do not fit one another, labels outside the classes; see
            :func:`bidensify.data.check_dataset`.
    """
    with accelerator.main_process_first():  # the others read what the first remembers on disk
        notes = [*_labels(train, "data.train"), *_labels(val, "data.val")]
    if recipe.compile and not compiles(recipe, accelerator.device):
        notes.append(
            "compile: true is for GPUs; on this CPU the training kernels are faster, and the step is not compiled"
        )
    share = recipe.data.batch_size // recipe.data.accumulate
    with seeded(recipe.seed), _untouched(student):
        # Under a seed of its own, so that the run's draws are not seen twice.
        look = Seeded(train.dataset, recipe.seed + 1) if isinstance(train, Seeded) else train
        samples: list[Any] = [look[index] for index in range(min(share, 4))]
        batch = {key: value[: min(share, 2)] for key, value in collate(samples).items()}
        batch = to_device(batch, accelerator.device, recipe.channels_last, student)
        for stage in recipe.stages:
            set_mode(student, stage)
            with Features(student, stage.layers, "student") as own:
                student.train()
                output = _forward(student, "student", batch["image"], accelerator)
                if teacher is None or not stage.distils:
                    Losses(stage.terms, task, own, None).check(output, batch)
                    continue
                with Features(teacher, stage.layers, "teacher") as theirs, eval_mode(teacher), torch.no_grad():
                    theirs_output = _forward(teacher, "teacher", batch["image"], accelerator)
                    Losses(stage.terms, task, own, theirs).check(output, batch, theirs_output)
        for name, model in (("student", student), ("teacher", teacher if recipe.evaluate.teacher else None)):
            if model is not None:
                _measure(name, model, task, val, recipe, accelerator)
    return notes


def _labels(dataset: Any, name: str) -> list[str]:
    report = check_dataset(dataset, name)
    return list(report.warnings) if report is not None else []


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts statistics and train/eval flags back at the end."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in model.named_buffers():
                if name in buffers and value.shape == buffers[name].shape:
                    value.copy_(buffers[name])
        for module, flag in flags:
            module.training = flag


def _forward(model: nn.Module, role: str, image: Tensor, accelerator: Accelerator) -> Any:
    """The network's output; what it raises is told with the shape that it was given."""
    reached: list[str] = []
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def hook(name: str) -> Any:
        return lambda module, args: reached.append(name)

    handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in norms]
    try:
        with forward_context(accelerator):
            return model(image)
    except BidensifyError:
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise ConfigError(_does_not_run(role, image, error)) from error
        raise ConfigError(
            f"the norm {reached[-1] if reached else ''!r} of the {role} sees one value per channel in a batch of "
            f"{len(image)} (it stands on a 1x1 map), and no variance can be taken of one value; use a data.batch_size of at "
            "least 2 per micro-batch (data.batch_size / data.accumulate)"
        ) from error
    except (RuntimeError, TypeError, IndexError, AttributeError, KeyError, AssertionError) as error:
        raise ConfigError(_does_not_run(role, image, error)) from error
    finally:
        for handle in handles:
            handle.remove()


def _does_not_run(role: str, image: Tensor, error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")[:300]
    return (
        f"the {role} does not run on images of shape {tuple(image.shape)}: {type(error).__name__}: {first}. Channels are the "
        "data set's (data.in_channels, and the network's own option), sizes data.size and data.train_size"
    )


def _measure(
    name: str, model: nn.Module, task: Task, val: Dataset[Sample], recipe: Recipe, accelerator: Accelerator
) -> None:
    few = Subset(val, range(min(2, len(val))))  # type: ignore[arg-type]
    through = False

    def on_batch(done: int, total: int) -> None:
        nonlocal through
        through = done == total

    try:
        metrics = evaluate(
            model, task, few, batch_size=2, device=accelerator.device, precision=recipe.precision,
            channels_last=recipe.channels_last, views=recipe.views(), on_batch=on_batch,
        )  # fmt: skip
    except BidensifyError as error:
        if through and isinstance(error, DataError):
            return  # these images have nothing to measure; the data set has
        raise type(error)(f"evaluation of the {name}: {error}") from error
    except (RuntimeError, TypeError, IndexError, ValueError, KeyError) as error:
        image: Tensor = val[0]["image"]
        raise ConfigError(f"evaluation: {_does_not_run(name, image, error)}") from error
    if metrics and task.primary not in metrics:
        raise ConfigError(
            f"the task {task.name!r} chooses weights by {task.primary!r}, which its metrics do not give: {sorted(metrics)}"
        )


def disk_needed(student: nn.Module, recipe: Recipe) -> int:
    """Returns how many bytes a run's folder takes at the most: two checkpoints while one replaces the other, and weights."""
    weights: int = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    average = weights if recipe.ema is not None else 0
    return 2 * (weights + moments + average) + 3 * weights


def check_disk(folder: Path, needed: int) -> str:
    """Compares what a run takes with what is free where its folder will be.

    Returns:
        Both, in words.

    Raises:
        ConfigError: there is not enough.
    """
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    found = f"{needed / 1e6:,.0f} MB at the most, {free / 1e6:,.0f} MB free in {str(place)!r}"
    if free < needed:
        raise ConfigError(f"the run's folder {str(folder)!r} needs {found}; make room, or choose another run folder")
    return found


@dataclass
class RunCheck:
    """What :func:`bidensify.train.check_run` found.

    Attributes:
        rows: (what, what was found), in the order of the looks.
        warnings: what is probably not meant.
        problems: what the run would be refused for; none where it can start.
        network: what the run would train, rewritten if it is a student; None where it could not be built.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    network: nn.Module | None = field(default=None, repr=False)

    @contextmanager
    def look(self, what: str) -> Iterator[None]:
        """Notes what goes wrong within as a problem, so that the other looks are taken all the same."""
        try:
            yield
        except (BidensifyError, OSError) as error:
            self.problems.append(f"{what}: {error}")

    def add(self, what: str, found: str) -> None:
        """Adds a row."""
        self.rows.append((what, found))
