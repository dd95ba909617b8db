"""What a dense-prediction task is, and how the outputs of different model families are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from bidensify.data.base import Sample
from bidensify.errors import ConfigError

__all__ = ["Sample", "Task", "TaskMetrics", "auxiliary_output", "raw_output", "resize", "target_of"]

# Where model families put their dense prediction: transformers' ModelOutput, torchvision's dict.
_KEYS = ("logits", "predicted_depth", "out")


class TaskMetrics(Protocol):
    """Running metrics over batches; a :class:`torchmetrics.Metric`, so it sums over processes in ``compute``."""

    def update(self, output: Any, target: Sample) -> None:
        """Adds a batch: ``output`` as the model returned it, ``target`` the collated sample."""

    def compute(self) -> dict[str, float]:
        """Returns every metric of what was added, over all processes."""

    def reset(self) -> None:
        """Forgets what was added."""

    def to(self, device: torch.device | str) -> TaskMetrics:
        """Moves the running sums."""


@runtime_checkable
class Task(Protocol):
    """Loss, metrics and pictures of one kind of dense prediction.

    ``primary`` names the metric that selects a checkpoint; ``higher_is_better`` its direction.
    """

    name: str
    primary: str
    higher_is_better: bool

    def loss(self, output: Any, target: Sample) -> Tensor:
        """Returns the scalar training loss."""

    def logits(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the raw prediction (N, C, H, W), resized bilinearly to ``size`` if that is given."""

    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the final prediction (N, H, W): class indices, or depth."""

    def metrics(self) -> TaskMetrics:
        """Returns fresh running metrics."""

    def picture(self, image: Tensor | None, output_or_target: Any) -> Tensor:
        """Returns a colour picture, uint8 (3, H, W), of one prediction or one target."""


def raw_output(output: Any) -> Tensor:
    """Finds the dense prediction in what a model returned.

    Reads a tensor (segmentation_models_pytorch, timm), a mapping or object with ``logits`` or ``predicted_depth``
    (transformers' ``ModelOutput``) and a mapping with ``out`` (torchvision). A prediction (N, H, W) gains a channel.

    Returns:
        (N, C, H, W), floating point; half precision is widened to float32.

    Raises:
        ConfigError: there is no such tensor, or it is not (N, C, H, W) or (N, H, W).
    """
    found: Any = output
    if not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            found = next((output[key] for key in _KEYS if output.get(key) is not None), None)
        else:
            found = next((value for key in _KEYS if (value := getattr(output, key, None)) is not None), None)
        if not isinstance(found, Tensor):
            given = f"the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else "no such attribute"
            raise ConfigError(
                f"the model returned {type(output).__name__} with {given}; a dense prediction must be a tensor or come "
                f"under one of {', '.join(_KEYS)}. Wrap the model so that its forward returns the prediction"
            )
    if found.ndim == 3:
        found = found.unsqueeze(1)
    if found.ndim != 4 or not found.is_floating_point():
        raise ConfigError(
            f"the model's prediction has shape {tuple(found.shape)} and type {found.dtype}; a dense prediction is a "
            "floating-point tensor (N, C, H, W) or (N, H, W). Wrap the model so that it returns one"
        )
    return _widen(found)


def _widen(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def auxiliary_output(output: Any) -> Tensor | None:
    """Returns the auxiliary head's prediction of torchvision's segmentation models (key ``aux``), if there is one."""
    found = output.get("aux") if isinstance(output, Mapping) else None
    return _widen(found) if isinstance(found, Tensor) else None


def resize(prediction: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resizes (N, C, H, W) to ``size`` = (H', W') bilinearly, pixel centres aligned; returns it as it is if it fits."""
    if size is None or tuple(prediction.shape[-2:]) == tuple(size):
        return prediction
    return F.interpolate(prediction, size=tuple(size), mode="bilinear", align_corners=False)


def target_of(target: Sample, key: str, task: str, batch: int) -> Tensor:
    """Returns ``target[key]`` as (N, H, W) after checking that it is there and of the batch's size.

    Raises:
        ConfigError: the key is missing or the shape does not fit.
    """
    if key not in target:
        raise ConfigError(
            f"the task {task!r} needs {key!r} in each sample, but the sample has {sorted(target)}; "
            "use a data set that gives it, or another task"
        )
    values = target[key]
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 3 or values.shape[0] != batch:
        raise ConfigError(
            f"{key!r} has shape {tuple(target[key].shape)} beside a prediction of {batch} images; it must be (N, H, W)"
        )
    return values
