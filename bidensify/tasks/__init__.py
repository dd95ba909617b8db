"""Dense-prediction tasks: losses, metrics, pictures."""

from __future__ import annotations

import inspect
from typing import Any

from bidensify.errors import ConfigError
from bidensify.tasks.base import Sample, Task, TaskMetrics
from bidensify.tasks.depth import DepthTask
from bidensify.tasks.metrics import DepthMetrics, SegmentationMetrics
from bidensify.tasks.pictures import colour_depth, colour_mask, default_palette
from bidensify.tasks.segmentation import SegmentationTask

_TASKS: dict[str, type[SegmentationTask] | type[DepthTask]] = {"segmentation": SegmentationTask, "depth": DepthTask}

__all__ = [
    "DepthMetrics",
    "DepthTask",
    "Sample",
    "SegmentationMetrics",
    "SegmentationTask",
    "Task",
    "TaskMetrics",
    "available_tasks",
    "build_task",
    "colour_depth",
    "colour_mask",
    "default_palette",
    "task_options",
]


def available_tasks() -> list[str]:
    """Returns the names that :func:`build_task` takes."""
    return sorted(_TASKS)


def task_options(name: str) -> list[str]:
    """Returns the options of a task.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in _TASKS:
        raise ConfigError(f"there is no task {name!r}; use one of {', '.join(available_tasks())}")
    return list(inspect.signature(_TASKS[name]).parameters)


def build_task(name: str, **options: Any) -> Task:
    """Builds a task by name.

    Args:
        name: ``segmentation`` or ``depth``.
        options: of :class:`SegmentationTask` or :class:`DepthTask`.

    Raises:
        ConfigError: there is no such task or option, an option is missing, or a value is out of range.
    """
    known = task_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"the task {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}")
    try:
        return _TASKS[name](**options)
    except TypeError as error:
        raise ConfigError(f"the task {name!r} cannot be built from {options}: {error}") from error
