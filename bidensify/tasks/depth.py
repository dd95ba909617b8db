"""Monocular depth."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bidensify.errors import ConfigError
from bidensify.tasks import losses, pictures
from bidensify.tasks.base import Sample, raw_output, resize, target_of
from bidensify.tasks.metrics import DepthMetrics

Output = Literal["log", "linear", "sigmoid", "inverse"]
_OUTPUTS: tuple[Output, ...] = ("log", "linear", "sigmoid", "inverse")


class DepthTask:
    """Scale-invariant log training, AbsRel evaluation; a depth of 0 in the target is invalid.

    Args:
        median_scaling: scale each prediction by the ratio of medians before it is measured (for data or models without
            a metric scale); see :class:`bidensify.tasks.metrics.DepthMetrics`.
        min_depth, max_depth: metres (or the data's unit). Only ground truth inside counts; predictions are clamped to
            it.
        output: what the network's one channel x means: ``log`` depth = exp(x); ``linear`` depth = x; ``sigmoid``
            depth = min + (max − min) · sigmoid(x); ``inverse`` depth = 1 / x (disparity).
        focus: weight of the squared mean in SILog, 0 (plain RMSE of the logarithm) to 1 (scale ignored).

    Raises:
        ConfigError: an option is out of range.
    """

    name = "depth"
    primary = "absrel"
    higher_is_better = False

    def __init__(
        self,
        median_scaling: bool = False,
        min_depth: float = 1e-3,
        max_depth: float = 80.0,
        output: Output = "log",
        focus: float = 0.85,
    ) -> None:
        if not 0 < min_depth < max_depth < math.inf:
            raise ConfigError(f"min_depth={min_depth}, max_depth={max_depth}; depths need 0 < min_depth < max_depth")
        if output not in _OUTPUTS:
            raise ConfigError(f"output={output!r} is not known; use one of {', '.join(_OUTPUTS)}")
        if not 0 <= focus <= 1:
            raise ConfigError(f"focus={focus}; it lies between 0 and 1")
        self.median_scaling = median_scaling
        self.min_depth, self.max_depth = min_depth, max_depth
        self.output: Output = output
        self.focus = focus

    def logits(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the network's raw channel (N, 1, H, W), resized bilinearly to ``size``.

        Raises:
            ConfigError: there is no such tensor in ``output``, or it has several channels.
        """
        raw = raw_output(output)
        if raw.shape[1] != 1:
            raise ConfigError(
                f"the model's prediction has {raw.shape[1]} channels (shape {tuple(raw.shape)}); "
                "a depth network has one. Build the model with one class"
            )
        return resize(raw, size)

    def log_depth(self, raw: Tensor) -> Tensor:
        """Returns ln(depth) of the raw channel, with a gradient everywhere (used by the loss)."""
        if self.output == "log":
            return raw
        if self.output == "sigmoid":
            return (self.min_depth + (self.max_depth - self.min_depth) * raw.sigmoid()).log()
        if self.output == "inverse":
            return -_soft_log(raw, 1 / self.max_depth)
        return _soft_log(raw, self.min_depth)

    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the depth (N, H, W), clamped to [min_depth, max_depth]; the raw channel is resized first."""
        raw = self.logits(output, size)[:, 0]
        if self.output == "log":
            raw = raw.clamp(math.log(self.min_depth), math.log(self.max_depth)).exp()
        elif self.output == "sigmoid":
            raw = self.min_depth + (self.max_depth - self.min_depth) * raw.sigmoid()
        elif self.output == "inverse":
            raw = 1 / raw.clamp(1 / self.max_depth, 1 / self.min_depth)
        return raw.clamp(self.min_depth, self.max_depth)

    def loss(self, output: Any, target: Sample) -> Tensor:
        """Returns the SILog loss over valid pixels; see :func:`bidensify.tasks.losses.silog_loss`.

        Args:
            output: what the model returned.
            target: ``depth`` (N, H, W), 0 = invalid; the prediction is resized to it.

        Returns:
            A scalar; 0 if no pixel is valid.
        """
        raw = self.logits(output)
        depth = target_of(target, "depth", self.name, len(raw)).to(raw.dtype)
        raw = resize(raw, (depth.shape[1], depth.shape[2]))
        return losses.silog_loss(self.log_depth(raw)[:, 0], depth, self.valid(depth), focus=self.focus)

    def valid(self, depth: Tensor) -> Tensor:
        """Returns which depths count: finite and inside [min_depth, max_depth]."""
        return torch.isfinite(depth) & (depth >= self.min_depth) & (depth <= self.max_depth)

    def _read(self, output: Any, target: Sample) -> tuple[Tensor, Tensor]:
        raw = self.logits(output)
        depth = target_of(target, "depth", self.name, len(raw))
        return self.predict(raw, (depth.shape[1], depth.shape[2])), depth

    def metrics(self) -> DepthMetrics:
        """Returns fresh metrics; see :class:`bidensify.tasks.metrics.DepthMetrics`."""
        return DepthMetrics(
            self._read, min_depth=self.min_depth, max_depth=self.max_depth, median_scaling=self.median_scaling
        )

    def picture(
        self,
        image: Tensor | None,
        output_or_target: Any,
        *,
        limits: tuple[float, float] | None = None,
        blend: float = 0.0,
    ) -> Tensor:
        """Colours one prediction or one target on a logarithmic scale, near bright and far dark.

        Args:
            image: uint8 (3, H, W), whose size the picture takes, or None.
            output_or_target: a sample with ``depth``; a depth map (H, W); or a model's output for one image.
            limits: nearest and farthest depth of the scale; by default the map's own percentiles.
            blend: share of the image mixed in, 0 to 1.

        Returns:
            uint8 (3, H, W) on the CPU; invalid pixels are black.
        """
        found = output_or_target
        if isinstance(found, dict) and "depth" in found:
            depth = found["depth"].reshape(found["depth"].shape[-2:])
        elif isinstance(found, Tensor) and found.ndim == 2:
            depth = found
        else:
            size = None if image is None else (image.shape[-2], image.shape[-1])
            depth = self.predict(found, size)[0]
        return pictures.finish(pictures.colour_depth(depth, limits=limits), image, blend)


def _soft_log(value: Tensor, floor: float) -> Tensor:
    """ln(value), continued below ``floor`` by its tangent, so that a value at or below 0 still has a gradient."""
    above = value.clamp(min=floor)
    return above.log() + (value - above) / floor
