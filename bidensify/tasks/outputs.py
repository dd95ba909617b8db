"""Where model families put their dense prediction: one reading of tensors, dicts, ModelOutputs and auxiliary heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors

from bidensify.data.base import Sample, Transforms
from bidensify.errors import ConfigError

__all__ = ["auxiliary_outputs", "predict_image", "predict_restored", "raw_output", "resize", "restore", "target_of"]

# transformers' ModelOutput, torchvision's dict, flow and image models.
_KEYS = ("logits", "predicted_depth", "out", "reconstruction", "flow")
_AUXILIARY = ("aux", "aux_out", "aux_logits", "auxiliary_logits")
_QUERIES = ("class_queries_logits", "masks_queries_logits")


def raw_output(output: Any, main: int = 0) -> Tensor:
    """Finds the dense prediction in what a model returned.

    Reads a tensor (segmentation_models_pytorch, timm), a mapping or object with ``logits``, ``predicted_depth``,
    ``reconstruction`` or ``flow`` (transformers' ``ModelOutput``) or ``out`` (torchvision), and a list or tuple of
    predictions with the same number of channels (deep supervision, RAFT). A prediction (N, H, W) gains a channel.

    Args:
        output: what the model returned.
        main: which of a list is the prediction: 0, the first, or -1, the last; the others are auxiliary.

    Returns:
        (N, C, H, W), floating point; half precision is widened to float32.

    Raises:
        ConfigError: there is no such tensor, or it is not (N, C, H, W) or (N, H, W).
    """
    found: Any = output
    if isinstance(output, Sequence) and not isinstance(output, str):
        found = _list(output)[main]
    elif not isinstance(output, Tensor):
        found = next((value for key in _KEYS if (value := _get(output, key)) is not None), None)
        if not isinstance(found, Tensor):
            raise ConfigError(_not_dense(output))
    if found.ndim == 3:
        found = found.unsqueeze(1)
    if found.ndim != 4 or not found.is_floating_point():
        raise ConfigError(
            f"the model's prediction has shape {tuple(found.shape)} and type {found.dtype}; a dense prediction is a "
            "floating-point tensor (N, C, H, W) or (N, H, W). Wrap the model so that it returns one"
        )
    return _widen(found)


def auxiliary_outputs(output: Any, main: int = 0) -> list[Tensor]:
    """Returns the predictions of auxiliary heads: torchvision's ``aux``, or what a list holds beside its ``main`` one.

    Raises:
        ConfigError: a list holds something else than predictions.
    """
    if isinstance(output, Sequence) and not isinstance(output, str):
        rest = _list(output)
        del rest[main]
        return [_widen(value) for value in rest]
    if isinstance(output, Tensor):
        return []
    return [_widen(value) for key in _AUXILIARY if isinstance(value := _get(output, key), Tensor)]


def _get(output: Any, key: str) -> Any:
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)


def _list(output: Sequence[Any]) -> list[Tensor]:
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in output]
    maps = [v for v in output if isinstance(v, Tensor) and v.ndim == 4 and v.is_floating_point()]
    if not maps or len(maps) < len(output) or len({(len(v), v.shape[1]) for v in maps}) > 1:
        raise ConfigError(
            f"the model returned a {type(output).__name__} of {shapes}; a list may hold the prediction and those of "
            "auxiliary heads, each (N, C, H, W) with the same N and C. Wrap the model so that it returns the prediction"
        )
    return maps


def _not_dense(output: Any) -> str:
    keys = sorted(map(str, output)) if isinstance(output, Mapping) else None
    given = f"the keys {keys}" if keys is not None else "no such attribute"
    if all(_get(output, key) is not None for key in _QUERIES):
        return (
            f"the model returned {type(output).__name__} with {' and '.join(_QUERIES)}, scores of queries, not of pixels; a "
            "dense prediction has scores per pixel. Wrap the model so that its forward returns torch.einsum('bqc,bqhw->bchw', "
            "class_queries_logits.softmax(-1)[..., :-1], masks_queries_logits.sigmoid()).clamp(min=1e-6).log()"
        )
    return (
        f"the model returned {type(output).__name__} with {given}; a dense prediction must be a tensor or come "
        f"under one of {', '.join(_KEYS)}. Wrap the model so that its forward returns the prediction"
    )


def _widen(values: Tensor) -> Tensor:
    return values.float() if values.itemsize == 2 else values


def resize(prediction: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resizes (N, C, H, W) to ``size`` = (H', W') bilinearly, pixel centres aligned; returns it as it is if it fits."""
    if size is None or tuple(prediction.shape[-2:]) == tuple(size):
        return prediction
    return F.interpolate(prediction, size=tuple(size), mode="bilinear", align_corners=False)


def restore(prediction: Tensor, extent: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Brings a prediction on the network's input back to the image's own size: padding is cut off, the rest resized.

    Args:
        prediction: (N, C, h, w), of the input's size or a fraction of it.
        extent: (4,) or (N, 4), as :class:`bidensify.data.Fit` notes it: height and width of the image in the input, and of
            the input. None where the image fills the input.
        size: the image's own (height, width).

    Returns:
        (N, C, *size).
    """
    if extent is None:
        return resize(prediction, size)
    rows = [tuple(map(int, row)) for row in extent.reshape(-1, 4).tolist()]
    if len(set(rows)) > 1:
        return torch.cat([restore(one, row, size) for one, row in zip(torch.split(prediction, 1), extent, strict=True)])
    height, width, *outer = rows[0]
    if [height, width] != outer:
        prediction = resize(prediction, (outer[0], outer[1]))[..., :height, :width]
    return resize(prediction, size)


@torch.inference_mode()
def predict_image(model: nn.Module, task: Any, image: Tensor, transforms: Transforms, views: Any = None) -> Tensor:
    """Runs a model on one image of any size.

    Args:
        model: in eval mode; the image goes where its first parameter or buffer is.
        task: reads the output.
        image: (C, H, W), upright, uint8 or floats in [0, 1]; see :class:`bidensify.data.ImageReader`.
        transforms: those of evaluation; see :func:`bidensify.data.build_transforms`.
        views: a :class:`bidensify.tasks.Views`; by default one look at the whole.

    Returns:
        The task's prediction at the image's own size, on the CPU, without the batch's dimension.
    """
    sample = transforms({"image": tv_tensors.Image(image)})
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    batch = sample["image"][None].to(place)
    output = model(batch) if views is None else views(model, task, batch)
    return predict_restored(task, output, sample.get("extent"), (image.shape[-2], image.shape[-1]))[0].cpu()


def predict_restored(task: Any, output: Any, extent: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Returns a task's prediction (N, ...) at the image's own size, of what a model returned for a fitted image.

    Args:
        task: reads the output; a task of another class than those here is given the raw prediction at that size.
        output: what the model returned.
        extent: of the sample; see :func:`restore`.
        size: the image's own (height, width).
    """
    back = getattr(task, "restore", restore)
    prediction: Tensor = task.predict(back(task.logits(output), extent, size))
    return prediction


def target_of(target: Sample, key: str, task: str, batch: int, planes: int | None = None) -> Tensor:
    """Returns ``target[key]`` as (N, H, W), or (N, planes, H, W), after checking that it is there and of the batch's size.

    Raises:
        ConfigError: the key is missing or the shape does not fit.
    """
    if key not in target:
        raise ConfigError(
            f"the task {task!r} needs {key!r} in each sample, but the sample has {sorted(target)}; "
            "use a data set that gives it, or another task"
        )
    values = target[key]
    if planes is None and values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    wanted = "(N, H, W)" if planes is None else f"(N, {planes}, H, W)"
    if values.ndim != wanted.count(",") + 1 or len(values) != batch or planes not in (None, values.shape[1]):
        raise ConfigError(
            f"{key!r} has shape {tuple(target[key].shape)} beside a prediction of {batch} images; the task {task!r} needs "
            f"{wanted}"
        )
    return values
