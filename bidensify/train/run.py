"""Whole runs from a recipe: build teacher and student, check, train, and read a finished run back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bidensify._util.seeding import seeded
from bidensify._util.wrappers import unwrap
from bidensify.config import BidensifyConfig
from bidensify.data import check_dataset
from bidensify.errors import ConfigError, FormatError
from bidensify.models import load_weights
from bidensify.nn import binary_layers
from bidensify.nn.used_weight import copy_model
from bidensify.recipe import Recipe, load_recipe
from bidensify.recipe.sections import TeacherSection
from bidensify.train.allocation import allocate_run
from bidensify.train.check import RunCheck, check_disk, disk_needed
from bidensify.train.rundir.folder import RunFolder, RunResult
from bidensify.train.start import finetune, try_start

Role = Literal["student", "teacher"]


def build_teacher(recipe: Recipe, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Builds the recipe's full-precision network and loads its trained weights.

    Args:
        recipe: a student's recipe.
        weights: a file (see :func:`bidensify.models.load_weights`) or a teacher's run folder; by default
            ``teacher.weights`` of the recipe.

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
    note = load_weights(model, source)
    if note:
        warnings.warn(f"the teacher's weights {os.fspath(source)!r}: {note}", stacklevel=2)
    return model.eval()


def build_student(
    recipe: Recipe,
    teacher: nn.Module | None = None,
    *,
    in_channels: int | None = None,
    config: BidensifyConfig | None = None,
) -> nn.Module:
    """Rewrites the recipe's network to its 1-bit form.

    Args:
        recipe: a student's recipe; section ``binarize`` configures the rewrite.
        teacher: the network whose weights the student starts from; not changed. Without it the student starts from a
            freshly built model.
        in_channels: channels of an image; by default the recipe's, or those of the network.
        config: of the rewrite; by default the recipe's.

    Raises:
        ConfigError: the recipe has a budget, whose rules only a run finds, and no ``config`` is given.
    """
    from bidensify.rewrite import bidensify
    from bidensify.rewrite.record.channels import image_channels

    if recipe.budget is not None and config is None:
        raise ConfigError(
            f"recipe {recipe.name!r} has binarize.budget: which layer gets which precision is found at the start of its run "
            "(bidensify finetune); give the config that bidensify.allocate found, or leave the budget out"
        )

    base = recipe.build_model() if teacher is None else teacher
    with seeded(recipe.seed):
        channels = in_channels or recipe.in_channels or image_channels(base)
        example = None if recipe.data.size is None else torch.zeros(2, channels, *recipe.data.size)
        return bidensify(base, config or recipe.config(), example_inputs=example, inplace=teacher is None)


def run_recipe(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    *,
    role: Role = "student",
    teacher_weights: str | os.PathLike[str] | None = None,
    train_teacher: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Trains the teacher or the student that a recipe describes, from nothing but the recipe.

    Args:
        recipe: a recipe, its file, or its mapping.
        run_dir: folder of the run.
        role: "teacher" runs ``teacher.stages`` on the full-precision network, "student" the recipe's own stages.
        teacher_weights: of the student's teacher; by default ``teacher.weights`` of the recipe, and on ``resume`` those
            that the run began with.
        train_teacher: where the recipe has ``teacher.stages`` and no weights are named, train the student's teacher
            first, in a folder beside the run's (RUN_DIR_teacher).
        resume: go on with a run that was stopped, for more epochs if the recipe has more.
        quiet: print nothing.

    Raises:
        ConfigError: another role, a recipe with mistakes, or what :func:`bidensify.finetune` raises.
    """
    if role not in ("student", "teacher"):
        raise ConfigError(f"run_recipe: role={role!r} must be 'student' or 'teacher'")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if role == "teacher":
        loaded = loaded.for_teacher()
        train, val = loaded.build_datasets()
        return finetune(
            loaded.build_model(), recipe=loaded, train=train, val=val, run_dir=run_dir, resume=resume, quiet=quiet
        )
    folder = RunFolder(Path(run_dir))
    # A folder that cannot be the student's is told before a teacher is trained.
    folder.inspect(loaded, resume)
    if resume and teacher_weights is None:
        teacher_weights = folder.teacher_weights()
    train, val = loaded.build_datasets()
    channels = train.info.channels
    section = loaded.teacher
    weights = teacher_weights or (section.weights if section is not None else None)
    if weights is None and train_teacher and section is not None and section.stages:
        weights = folder.path.with_name(f"{folder.path.name}_teacher")
        if not quiet and os.environ.get("RANK", "0") == "0":
            print(f"No teacher's weights given: the recipe's teacher comes first, in {weights}")
        if not weights.exists():
            # Neither has its weights yet; all else that could stop the student after its teacher's hours is seen now.
            untrained = loaded.build_model()
            whole = build_student(loaded, untrained, in_channels=channels, config=loaded.config())
            try_start(whole, untrained, loaded, train, val)
        run_recipe(loaded, weights, role="teacher", resume=weights.exists(), quiet=quiet)
    teacher: nn.Module | None = None
    if weights is not None or section is not None:
        teacher = build_teacher(loaded, weights)
        path = os.path.abspath(weights) if weights is not None else None
        loaded = loaded.model_copy(
            update={"teacher": (section or TeacherSection()).model_copy(update={"weights": path})}
        )
    config = loaded.config()
    if loaded.budget is not None:
        config = allocate_run(loaded, teacher, train, val, folder, quiet=quiet)
    student = build_student(loaded, teacher, in_channels=channels, config=config)
    return finetune(
        student, teacher=teacher, recipe=loaded, train=train, val=val, run_dir=run_dir, resume=resume, quiet=quiet
    )


def check_run(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    role: Role = "student",
    teacher_weights: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
) -> RunCheck:
    """Looks at everything that a run of the recipe needs, and trains nothing.

    Networks and their options, the rewrite, weights, every label of both data sets, one batch through losses and
    evaluation, disk space, and, from two training steps, the time that an epoch takes.

    Args:
        recipe, role, teacher_weights: as for :func:`run_recipe`; teacher's weights that are not there yet are no problem.
        run_dir: where the run's folder will be; by default the working directory is asked for its space.

    Raises:
        ConfigError: another role, or a recipe with mistakes.
    """
    if role not in ("student", "teacher"):
        raise ConfigError(f"check_run: role={role!r} must be 'student' or 'teacher'")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    loaded = loaded.for_teacher() if role == "teacher" else loaded
    check, data = RunCheck(), None
    networks: tuple[nn.Module, nn.Module | None] | None = None
    check.add("recipe", f"{loaded.name}, {role}, {sum(stage.epochs for stage in loaded.stages)} epochs")
    with check.look("data"):
        data = loaded.build_datasets()
        for name, dataset in zip(("data.train", "data.val"), data, strict=True):
            with check.look(name):
                report = check_dataset(dataset, name)
                check.add(name, report.summary if report is not None else f"{len(dataset)} samples")
    with check.look("network"):
        model = loaded.build_model()
        count = sum(p.numel() for p in model.parameters())
        check.add("network", f"{loaded.model.source if loaded.model else ''}, {count / 1e6:.2f} M parameters")
        section = loaded.teacher
        source = teacher_weights or (section.weights if section is not None else None)
        if role == "student" and source is not None:
            note = load_weights(model, source)
            check.add("teacher", f"{os.fspath(source)}{f': {note}' if note else ''}")
        elif role == "student" and section is not None:
            check.add("teacher", "no weights given; trained first" if section.stages else "no weights given")
        networks = (model, None)
        if role == "student":
            channels = data[0].info.channels if data is not None else None
            student = build_student(loaded, model, in_channels=channels, config=loaded.config())
            layers = sum(1 for _ in binary_layers(student))
            later = ", fewer by the budget that the run spends" if loaded.budget is not None else ""
            check.add("rewrite", f"{layers} binary layers{later}, method {loaded.config().method}")
            networks = (student, model)
        check.network = networks[0]
    if networks is not None:
        with check.look("disk"):
            place = Path(run_dir) if run_dir is not None else Path.cwd()
            check.add("disk", check_disk(place, disk_needed(networks[0], loaded)))
    if networks is not None and data is not None:
        with check.look("start"):
            notes, seconds = try_start(networks[0], networks[1], loaded, *data, timed=True)
            check.warnings += notes
            epochs = sum(stage.epochs for stage in loaded.stages)
            check.add("time", f"{seconds:,.0f} s an epoch, {seconds * epochs / 3600:,.1f} h in all, from two steps")
    return check


def load_run(
    run_dir: str | os.PathLike[str], model: nn.Module | None = None, *, trust: bool = False
) -> tuple[nn.Module, Recipe]:
    """Rebuilds a finished run's model, binarized if it was, with its weights; in eval mode.

    A run's folder may be from anywhere, so its files are data: no module is imported, and no code is run, that only they
    name.

    Args:
        run_dir: the run's folder.
        model: the full-precision network that the run was for, left as it is; by default the recipe builds it.
        trust: the folder is your own, or of somebody whose code you would run: import what its recipe names.

    Returns:
        The model and the run's recipe.

    Raises:
        ConfigError: the folder is not that of a finished run, or its recipe does not name the network, or names code.
        FormatError: a file is truncated, edited, of another model, or lies outside of the folder.
    """
    folder = RunFolder(Path(run_dir))
    recipe = folder.load_recipe(trust)
    if not folder.weights.is_file():
        raise ConfigError(
            f"the run in {str(folder.path)!r} is not finished (it has no model.safetensors); resume it first"
        )
    base = copy_model(unwrap(model)) if model is not None else _base(recipe, folder.path)
    if folder.plan.is_file():
        from bidensify.rewrite import Plan, apply_plan

        try:
            base = apply_plan(base, Plan.from_dict(folder.read(folder.plan)))
        except ValueError as error:
            raise FormatError(f"{str(folder.plan)!r}: {error}; train the run again") from error
    load_weights(base, folder.weights)
    return base.eval(), recipe


def _base(recipe: Recipe, folder: Path) -> nn.Module:
    if recipe.model is None:
        raise ConfigError(
            f"the run in {str(folder)!r} trained a network of your own, which its recipe does not name; build it and give "
            "it: load_run(run_dir, model)"
        )
    # The run's own weights replace those that the network started from, which need not be here any more.
    return recipe.build_model(weights=False)
