"""Monocular depth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bidensify.data.base import DataInfo
from bidensify.errors import ConfigError
from bidensify.tasks import losses, pictures
from bidensify.tasks.base import DenseTask, Sample
from bidensify.tasks.outputs import target_of
from bidensify.tasks.registry import register_task

if TYPE_CHECKING:
    from bidensify.tasks.metrics import DepthMetrics

Output = Literal["log", "linear", "sigmoid", "inverse"]
_TINY = 1e-12
_OUTPUTS: tuple[Output, ...] = ("log", "linear", "sigmoid", "inverse")


@register_task("depth")
class DepthTask(DenseTask):
    """Monocular depth: scale-invariant log training, AbsRel evaluation; a depth of 0 in the target is invalid.

    The network has one channel. Metrics, each per image and averaged: ``absrel`` (selects), ``sqrel``, ``rmse``,
    ``rmse_log``, ``log10``, ``silog``, ``delta1``, ``delta2``, ``delta3``.

    Args:
        median_scaling: scale each prediction by the ratio of medians before it is measured (for data or models without
            a metric scale); see :class:`bidensify.tasks.metrics.DepthMetrics`.
        min_depth, max_depth: metres (or the data's unit). Only ground truth inside counts; predictions are clamped to
            it (with median_scaling once they are scaled). The farthest is by default the data set's, else 80.
        output: what the network's one channel x means: ``log`` depth = exp(x); ``linear`` depth = x; ``sigmoid``
            depth = min + (max − min) · sigmoid(x); ``inverse`` depth = 1 / x (disparity).
        focus: weight of the squared mean in SILog, 0 (plain RMSE of the logarithm) to 1 (scale ignored).
        aux_weight: weight of the loss of each auxiliary head, where the network has some.

    Raises:
        ConfigError: an option is out of range.

    Example:
        As NYUv2 is evaluated::

            task: {name: depth, output: sigmoid, min_depth: 0.001, max_depth: 10, focus: 0.85, aux_weight: 0.4}

        Depth without a metric scale::

            task: {name: depth, output: log, median_scaling: true}
    """

    name = "depth"
    primary = "absrel"
    higher_is_better = False
    outputs = "values"
    channels = 1

    def __init__(
        self,
        median_scaling: bool = False,
        min_depth: float = 1e-3,
        max_depth: float = 80.0,
        output: Output = "log",
        focus: float = 0.85,
        aux_weight: float = 0.4,
    ) -> None:
        if not 0 < min_depth < max_depth < math.inf:
            raise ConfigError(f"min_depth={min_depth}, max_depth={max_depth}; depths need 0 < min_depth < max_depth")
        if output not in _OUTPUTS:
            raise ConfigError(f"output={output!r} is not known; use one of {', '.join(_OUTPUTS)}")
        if not 0 <= focus <= 1 or aux_weight < 0:
            raise ConfigError(
                f"focus={focus}, aux_weight={aux_weight}; focus lies between 0 and 1, aux_weight is at least 0"
            )
        self.median_scaling = median_scaling
        self.min_depth, self.max_depth = min_depth, max_depth
        self.output: Output = output
        self.focus, self.aux_weight = focus, aux_weight

    @classmethod
    def options_from(cls, info: DataInfo) -> dict[str, Any]:
        """The farthest depth is the data set's, where it knows one."""
        return {} if info.max_depth is None else {"max_depth": info.max_depth}

    def truth(self, target: Sample, batch: int) -> Tensor:
        """Returns the target's depth (N, H, W).

        Raises:
            ConfigError: the sample has no depth, or one of a wrong shape.
        """
        return target_of(target, "depth", self.name, batch)

    def log_depth(self, raw: Tensor) -> Tensor:
        """Returns ln(depth) of the raw channel, with a gradient everywhere (used by the loss)."""
        if self.output == "log":
            return raw
        if self.output == "sigmoid":
            return (self.min_depth + (self.max_depth - self.min_depth) * raw.sigmoid()).log()
        if self.output == "inverse":
            return -_soft_log(raw, 1 / self.max_depth)
        return _soft_log(raw, self.min_depth)

    def decide(self, raw: Tensor) -> Tensor:
        """Returns the depth (N, H, W), clamped to [min_depth, max_depth]; with median_scaling, of no metric scale, above 0."""
        raw = raw[:, 0]
        # What has no scale yet is clamped by the metrics, once it is scaled.
        low, high = (_TINY, 1 / _TINY) if self.median_scaling else (self.min_depth, self.max_depth)
        if self.output == "log":
            raw = raw.clamp(math.log(low), math.log(high)).exp()
        elif self.output == "sigmoid":
            raw = self.min_depth + (self.max_depth - self.min_depth) * raw.sigmoid()
        elif self.output == "inverse":
            raw = 1 / raw.clamp(1 / high, 1 / low)
        return raw.clamp(low, high)

    def loss_of(self, raw: Tensor, truth: Tensor, target: Sample) -> Tensor:
        """Returns the SILog loss over valid pixels, 0 if none is; see :func:`bidensify.tasks.losses.silog_loss`."""
        depth = truth.to(raw.dtype)
        return losses.silog_loss(self.log_depth(raw)[:, 0], depth, self.valid(depth), focus=self.focus)

    def loss_weight(self, target: Sample) -> Tensor:
        """The images with a valid pixel."""
        return self.valid(target["depth"].flatten(1)).any(1).sum()

    def valid(self, depth: Tensor) -> Tensor:
        """Returns which depths count: finite and inside [min_depth, max_depth]."""
        return torch.isfinite(depth) & (depth >= self.min_depth) & (depth <= self.max_depth)

    def metrics(self) -> DepthMetrics:
        """Returns fresh metrics; see :class:`bidensify.tasks.metrics.DepthMetrics`."""
        from bidensify.tasks.metrics import DepthMetrics

        return DepthMetrics(
            self.read, min_depth=self.min_depth, max_depth=self.max_depth, median_scaling=self.median_scaling
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
