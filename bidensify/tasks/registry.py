"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from bidensify._util.registry import Registry
from bidensify.data.base import DataInfo
from bidensify.errors import ConfigError
from bidensify.tasks.base import Task

TASKS: Registry[Callable[..., Any]] = Registry("task", "bidensify.register_task")

Factory = TypeVar("Factory", bound=Callable[..., Any])


def register_task(name: str) -> Callable[[Factory], Factory]:
    """Registers a task under ``name``: a class (or function) whose parameters are the task's options.

    A name that is known goes to the newer one, with a warning.

    Raises:
        ConfigError: the name is no text.
    """
    return TASKS.register(name)


def available_tasks() -> list[str]:
    """Returns the names that :func:`build_task` takes."""
    return TASKS.names()


def task_options(name: str) -> list[str]:
    """Returns the options of a task.

    Raises:
        ConfigError: there is no such task.
    """
    return list(TASKS.options(name))


def missing_options(name: str, options: Collection[str]) -> list[str]:
    """Returns the options that a task needs and that are not among ``options``."""
    return [key for key, p in TASKS.options(name).items() if p.default is p.empty and key not in options]


def known_options(name: str, info: DataInfo | None) -> dict[str, Any]:
    """Returns the options of a task that a data set answers."""
    answers = getattr(TASKS[name], "options_from", None)
    known: dict[str, Any] = answers(info) if info is not None and callable(answers) else {}
    return known


def build_task(name: str, info: DataInfo | None = None, **options: Any) -> Task:
    """Builds a task by name.

    Args:
        name: see :func:`available_tasks`.
        info: of the data, which answers options that are not given (number of classes, their names and colours).
        options: of the task.

    Raises:
        ConfigError: there is no such task or option, an option is missing, or a value is out of range.
    """
    options = {**known_options(name, info), **options}
    try:
        task: Task = TASKS.make(name, options)
    except TypeError as error:
        raise ConfigError(f"the task {name!r} cannot be built from {options}: {error}") from error
    return task
