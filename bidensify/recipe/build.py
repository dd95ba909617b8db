"""Builds what a recipe names: model, data sets, task, and the recipe of the teacher's run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from bidensify._util.seeding import seeded
from bidensify.errors import ConfigError
from bidensify.recipe.schema import Recipe

if TYPE_CHECKING:
    from bidensify.data import DataInfo, DenseDataset
    from bidensify.tasks import Task

Value = TypeVar("Value")


def needed(recipe: Recipe, value: Value | None, key: str) -> Value:
    """Returns ``value``, the recipe's ``key``.

    Raises:
        ConfigError: it is None: the recipe is for a network and data sets of the caller's own.
    """
    if value is None:
        raise ConfigError(
            f"recipe {recipe.name!r} has no {key}, so it cannot be built from the recipe alone; add {key}, or give your "
            "own network and data sets to bidensify.finetune"
        )
    return value


def teacher_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe of the teacher's run; see :meth:`Recipe.for_teacher`.

    Raises:
        ConfigError: the recipe does not say how to train its teacher.
    """
    teacher = recipe.teacher
    if teacher is None or not teacher.stages:
        raise ConfigError(f"recipe {recipe.name!r} has no teacher.stages; add them to train its teacher")
    changes: dict[str, Any] = {
        "stages": teacher.stages,
        "teacher": None,
        "name": f"{recipe.name}_teacher",
        "binarize": {},
    }
    for key in ("optimizer", "ema", "evaluate"):
        if key in teacher.model_fields_set:
            value = getattr(teacher, key)
            changes[key] = Recipe.model_fields[key].get_default() if value is None else value
    if teacher.augment is not None:
        changes["data"] = recipe.data.model_copy(update={"augment": teacher.augment})
    return recipe.model_copy(update=changes)


def build_model(recipe: Recipe) -> torch.nn.Module:
    """Builds the full-precision network of a recipe; fresh weights depend on the recipe's seed alone."""
    from bidensify.models import build_model as build

    section = needed(recipe, recipe.model, "model.source")
    with seeded(recipe.seed):
        return build(section.source, **section.options)


def _dataset(recipe: Recipe, which: Literal["train", "val"]) -> DenseDataset:
    from bidensify.data import build_dataset as build

    section = needed(recipe, getattr(recipe.data, which), f"data.{which}")
    options = section.options
    if recipe.data.root is not None:
        options.setdefault("root", recipe.data.root)
    if section.name == "scenes":
        options.setdefault("size", recipe.image_size)
    elif section.name == "image_mask_folder" and "root" not in options:
        raise ConfigError(f"recipe {recipe.name!r}: data.root is not set; give the folder, e.g. --set data.root=FOLDER")
    return build(section.name, section.split, **options)


def build_datasets(recipe: Recipe) -> tuple[DenseDataset, DenseDataset]:
    """Builds (training, validation) data sets; normalisation is the recipe's, else the data set's own."""
    return build_dataset(recipe, "train"), build_dataset(recipe, "val")


def build_dataset(recipe: Recipe, which: Literal["train", "val"]) -> DenseDataset:
    """Builds one of the two data sets, with its transforms; see :func:`build_datasets`."""
    from bidensify.data import build_transforms

    data = recipe.data
    # The transforms need what the data set says about itself, so they come second.
    dataset = _dataset(recipe, which)
    info = dataset.info
    options: dict[str, Any] = {"mean": data.mean or info.mean, "std": data.std or info.std}
    if which == "train":
        options |= {key: getattr(data.augment, key) for key in ("hflip", "scale", "color_jitter")}
    else:
        options["keep_target_size"] = data.keep_target_size
    size = data.train_size if which == "train" and data.train_size is not None else recipe.image_size
    dataset.transforms = build_transforms(which == "train", size, ignore_index=info.ignore_index, **options)
    return dataset


def build_task(recipe: Recipe, info: DataInfo | None = None) -> Task:
    """Builds the task; see :meth:`Recipe.build_task`."""
    from bidensify.tasks import build_task as build

    options = recipe.task.options
    if recipe.task.name == "segmentation":
        if info is None and "num_classes" not in options:
            needed(recipe, recipe.data.val, "task.num_classes")
            info = _dataset(recipe, "val").info
        if info is not None:
            for key in ("num_classes", "ignore_index", "class_names", "palette"):
                options.setdefault(key, getattr(info, key))
    return build(recipe.task.name, **options)
