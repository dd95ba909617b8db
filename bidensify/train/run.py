"""Whole runs from a recipe: build teacher and student, train, and read a finished run back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bidensify._util.seeding import seeded
from bidensify.errors import ConfigError, FormatError
from bidensify.models import load_weights
from bidensify.nn.used_weight import copy_model
from bidensify.recipe import Recipe, load_recipe
from bidensify.recipe.sections import ModelSection
from bidensify.train.folder import RunResult
from bidensify.train.loop import finetune


def build_teacher(recipe: Recipe, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Builds the recipe's full-precision network and loads its trained weights.

    Args:
        recipe: a student's recipe.
        weights: a .safetensors file or a teacher's run folder; by default ``teacher.weights`` of the recipe.

    Raises:
        ConfigError: no weights are named anywhere.
        FormatError: the weights cannot be read or are of another model.
    """
    source = weights if weights is not None else recipe.teacher.weights if recipe.teacher is not None else None
    if source is None:
        raise ConfigError(
            f"recipe {recipe.name!r} names no teacher.weights; train the teacher first, then give its run folder, e.g. "
            "--set teacher.weights=runs/teacher"
        )
    model = recipe.build_model()
    load_weights(model, source)
    return model.eval()


def build_student(recipe: Recipe, teacher: nn.Module | None = None) -> nn.Module:
    """Rewrites the recipe's network to its 1-bit form.

    Args:
        recipe: a student's recipe; section ``binarize`` configures the rewrite.
        teacher: the network whose weights the student starts from; not changed. Without it the student starts from a
            freshly built model.
    """
    from bidensify.rewrite import bidensify

    base = recipe.build_model() if teacher is None else teacher
    with seeded(recipe.seed):
        example = None if recipe.data.size is None else torch.zeros(2, 3, *recipe.data.size)
        return bidensify(base, recipe.config(), example_inputs=example, inplace=teacher is None)


def run_recipe(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    *,
    role: Literal["student", "teacher"] = "student",
    teacher_weights: str | os.PathLike[str] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Trains the teacher or the student that a recipe describes, from nothing but the recipe.

    Args:
        recipe: a recipe, its file, or its mapping.
        run_dir: folder of the run.
        role: "teacher" runs ``teacher.stages`` on the full-precision network, "student" the recipe's own stages.
        teacher_weights: of the student's teacher; by default ``teacher.weights`` of the recipe.
        resume: go on with a run that was stopped.
        quiet: print nothing.

    Raises:
        ConfigError: another role, a recipe with mistakes, or what :func:`bidensify.finetune` raises.
    """
    if role not in ("student", "teacher"):
        raise ConfigError(f"run_recipe: role={role!r} must be 'student' or 'teacher'")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    teacher: nn.Module | None = None
    if role == "teacher":
        loaded = loaded.for_teacher()
        model = loaded.build_model()
    else:
        if teacher_weights is not None or loaded.teacher is not None:
            teacher = build_teacher(loaded, teacher_weights)
        model = build_student(loaded, teacher)
    train, val = loaded.build_datasets()
    return finetune(
        model, teacher=teacher, recipe=loaded, train=train, val=val, run_dir=run_dir, resume=resume, quiet=quiet
    )


def _base(recipe: Recipe, folder: Path) -> nn.Module:
    section = recipe.model
    if section is None:
        raise ConfigError(
            f"the run in {str(folder)!r} trained a network of your own, which its recipe does not name; build it and give "
            "it: load_run(run_dir, model)"
        )
    # The run's own weights replace those that the network started from, which need not be here any more.
    options = {key: value for key, value in section.options.items() if key not in ("weights_file", "encoder_imagenet")}
    return recipe.model_copy(update={"model": ModelSection(source=section.source, options=options)}).build_model()


def load_run(run_dir: str | os.PathLike[str], model: nn.Module | None = None) -> tuple[nn.Module, Recipe]:
    """Rebuilds a finished run's model, binarized if it was, with its weights; in eval mode.

    Args:
        run_dir: the run's folder.
        model: the full-precision network that the run was for, left as it is; by default the recipe builds it.

    Returns:
        The model and the run's recipe.

    Raises:
        ConfigError: the folder is not that of a finished run, or its recipe does not name the network.
        FormatError: the weights or the plan are truncated, or of another model.
    """
    folder = Path(run_dir)
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(f"{str(folder)!r} is not a run folder: it has no recipe.yaml")
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(f"the run in {str(folder)!r} is not finished (it has no model.safetensors); resume it first")
    recipe = load_recipe(folder / "recipe.yaml")
    model = _base(recipe, folder) if model is None else copy_model(model)
    if (folder / "plan.json").is_file():
        from bidensify.rewrite import Plan, apply_plan

        try:
            plan = Plan.from_dict(json.loads((folder / "plan.json").read_text(encoding="utf-8")))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FormatError(
                f"{str(folder / 'plan.json')!r} is not whole JSON ({error}); train the run again"
            ) from error
        model = apply_plan(model, plan)
    load_weights(model, folder / "model.safetensors")
    return model.eval(), recipe
