"""Dense-prediction tasks: losses, metrics, pictures."""

from __future__ import annotations

from bidensify.tasks.base import DenseTask, Outputs, Sample, Task, TaskMetrics
from bidensify.tasks.columns import paper_columns
from bidensify.tasks.depth import DepthTask
from bidensify.tasks.labels import BinaryTask, MultiLabelTask
from bidensify.tasks.outputs import predict_image, predict_restored, restore
from bidensify.tasks.pictures import colour_depth, colour_mask, default_palette
from bidensify.tasks.registry import (
    available_tasks,
    build_task,
    known_options,
    missing_options,
    register_task,
    task_options,
)
from bidensify.tasks.segmentation import SegmentationTask
from bidensify.tasks.values import FlowTask, RestorationTask
from bidensify.tasks.views import Views

__all__ = [
    "BinaryTask",
    "DenseTask",
    "DepthTask",
    "FlowTask",
    "MultiLabelTask",
    "Outputs",
    "RestorationTask",
    "Sample",
    "SegmentationTask",
    "Task",
    "TaskMetrics",
    "Views",
    "available_tasks",
    "build_task",
    "colour_depth",
    "colour_mask",
    "default_palette",
    "known_options",
    "missing_options",
    "paper_columns",
    "predict_image",
    "predict_restored",
    "register_task",
    "restore",
    "task_options",
]
