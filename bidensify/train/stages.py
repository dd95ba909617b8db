"""The stages of a run: what each binarizes, its optimizer, and calibration at its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from bidensify.data.batches import to_device
from bidensify.errors import ConfigError
from bidensify.losses import Features
from bidensify.nn import binary_layers, calibrate, set_binarization, state_of
from bidensify.recipe import Recipe
from bidensify.recipe.sections import StageSection
from bidensify.rewrite.least_squares import fit_scales
from bidensify.train.loaders import training_loader
from bidensify.train.optim import parameter_groups
from bidensify.train.step import check_compiler

_MODES = {"none": (False, False), "activations": (True, False), "all": (True, True)}


@dataclass(frozen=True)
class Epoch:
    """One epoch of the run.

    Attributes:
        index: number over the whole run, from 0.
        stage: its stage's number.
        within: number within the stage, from 0.
    """

    index: int
    stage: int
    within: int


def epochs(stages: Sequence[StageSection]) -> list[Epoch]:
    """Returns all epochs of a run in order."""
    plan: list[Epoch] = []
    for number, stage in enumerate(stages):
        plan += [Epoch(len(plan) + i, number, i) for i in range(stage.epochs)]
    return plan


def check_stages(student: nn.Module, recipe: Recipe, teacher: nn.Module | None) -> None:
    """Checks that the stages fit the models.

    Raises:
        ConfigError: the student is packed, or its own teacher, or a model is in half precision; a stage binarizes a model
            that has no binary layers, leaves binary ones off in the end, distils without a teacher, or names layers or
            parameters that are not there; or ``compile`` cannot be.
    """
    check_compiler(recipe)
    binary = any(True for _ in binary_layers(student))
    if teacher is student:
        raise ConfigError("the teacher is the student itself; give the full-precision network as teacher")
    for name, model in (("student", student), ("teacher", teacher)):
        half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16} if model is not None else ()
        for dtype in half:
            raise ConfigError(
                f"the {name}'s parameters are {dtype}, in which small steps are lost; call {name}.float(), and set "
                "precision: bf16 for speed"
            )
    if state_of(student) == "packed":
        raise ConfigError(
            "the student is packed, and bits do not train; give the latent network that it was packed from"
        )
    for stage in recipe.stages:
        if stage.binarize != "none" and not binary:
            raise ConfigError(
                f"stage {stage.name!r} binarizes {stage.binarize}, but the model has no binary layers; rewrite it with "
                "bidensify.bidensify(model, recipe.config()), or train the teacher with recipe.for_teacher()"
            )
        if stage.distils and teacher is None:
            raise ConfigError(
                f"stage {stage.name!r} distils, but no teacher was given; pass teacher=, or drop those losses"
            )
        Features(student, stage.layers, "student")
        if teacher is not None:
            Features(teacher, stage.layers, "teacher")
        parameter_groups(student, recipe.optimizer, stage)
    last = recipe.stages[-1]
    if binary and last.binarize != "all":
        raise ConfigError(
            f"the last stage {last.name!r} has binarize: {last.binarize}, so the result would not be 1-bit; "
            "end with a stage of binarize: all"
        )


def set_mode(student: nn.Module, stage: StageSection) -> None:
    """Switches the binary layers to what the stage binarizes."""
    activations, weights = _MODES[stage.binarize]
    set_binarization(student, activations=activations, weights=weights)


def calibration_batches(
    student: nn.Module, train: Dataset[dict[str, Tensor]], recipe: Recipe, device: torch.device, epoch: int
) -> list[Tensor]:
    """Returns images (N, 3, H, W) of the first ``calibrate.batches`` global batches of an epoch, on every process."""
    batches = islice(training_loader(train, recipe, epoch), recipe.calibrate.batches)
    return [to_device(batch, device, recipe.channels_last, student)["image"] for batch in batches]


def calibrate_start(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Dataset[dict[str, Tensor]],
    recipe: Recipe,
    accelerator: Accelerator,
    epoch: Epoch,
) -> None:
    """Calibrates a student at the start of a stage: thresholds and norms of the first, norms of later ones.

    Raises:
        ConfigError: the recipe asks for least squares, and there is no teacher.
    """
    first = epoch.stage == 0
    if recipe.calibrate.batches == 0 or not any(True for _ in binary_layers(student)):
        return
    if first or recipe.calibrate.each_stage:
        batches = calibration_batches(student, train, recipe, accelerator.device, epoch.index)
        if first and recipe.calibrate.least_squares:
            if teacher is None:
                raise ConfigError(
                    f"recipe {recipe.name!r} has calibrate.least_squares, which fits to a teacher's activations; add "
                    "teacher.weights or teacher.stages"
                )
            fit_scales(student, teacher, batches)
            return
        calibrate(student, batches, thresholds=first, norms=True)
