"""What pydantic cannot see: sections that must agree, and the options of data sets, tasks and the rewrite."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bidensify._util.names import near
from bidensify.errors import BidensifyError, ConfigError
from bidensify.precisions import read_budget
from bidensify.recipe.schema import Recipe


def check_recipe(recipe: Recipe) -> list[str]:
    """Returns the mistakes of a recipe whose sections are each well-formed, each with its path."""
    return [*_data(recipe), *_task(recipe), *_binarize(recipe.binarize), *_evaluate(recipe)]


def _unknown(path: str, name: str, known: list[str]) -> str:
    return f"{path}.{name}: unknown key{near(name, known)}"


def _data(recipe: Recipe) -> list[str]:
    from bidensify.data import available_datasets, dataset_options

    mistakes = []
    for path, section in (("data.train", recipe.data.train), ("data.val", recipe.data.val)):
        if section is None:
            continue
        if section.name not in available_datasets():
            names = available_datasets()
            mistakes.append(f"{path}.name: there is no data set {section.name!r}{near(section.name, names)}")
            continue
        options = dataset_options(section.name)
        known = ["name", "split", *options]
        mistakes += [_unknown(path, name, known) for name in section.options if name not in options]
    return mistakes


def _evaluate(recipe: Recipe) -> list[str]:
    try:
        recipe.views()
    except BidensifyError as error:
        return [str(error)]
    return []


def _task(recipe: Recipe) -> list[str]:
    from bidensify.tasks import available_tasks, task_options

    task = recipe.task
    if task.name not in available_tasks():
        return [f"task.name: there is no task {task.name!r}{near(task.name, available_tasks())}"]
    options = task_options(task.name)
    return [_unknown("task", name, ["name", *options]) for name in task.options if name not in options]


def _binarize(section: Mapping[str, Any]) -> list[str]:
    from bidensify.config import GONE, BidensifyConfig
    from bidensify.methods import available_methods, get_method, no_such_bits

    known = ["version", "budget", *(item.name for item in dataclasses.fields(BidensifyConfig))]
    mistakes = [_unknown("binarize", name, known) for name in section if name not in known and name not in GONE]
    section, budget = {name: value for name, value in section.items() if name != "budget"}, section.get("budget")
    if budget is not None:
        try:
            read_budget(budget)
        except ConfigError as error:
            mistakes.append(f"binarize.{error}")
    method = section.get("method", "bidense")
    try:
        get_method(method)
    except (ConfigError, TypeError):
        mistakes.append(f"binarize.method: there is no method {method!r}{near(method, available_methods())}")
    if not mistakes:
        try:
            config = BidensifyConfig.from_dict(section)
            if config.act_bits not in (found := get_method(config.method)).act_bits:
                mistakes.append(f"binarize.{no_such_bits(found, config.act_bits)}")
        except (BidensifyError, TypeError) as error:
            mistakes.append(f"binarize: {error}")
    return mistakes
