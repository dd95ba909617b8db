"""Running metrics on torchmetrics; their states are sums, so processes are joined exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from bidensify.errors import DataError
from bidensify.tasks.base import Sample

# What a task gives its metrics: (output, target) -> aligned prediction and ground truth.
Read = Callable[[Any, Sample], tuple[Tensor, Tensor]]

DEPTH_NAMES = ("absrel", "sqrel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")


class SegmentationMetrics(Metric):
    """Metrics of a semantic segmentation from one confusion matrix over every labelled pixel seen.

    ``compute`` gives, each in [0, 1]:

    - ``miou``: mean intersection over union, over the classes that occur in the ground truth **or** in the prediction.
      A class in neither does not count; a class that is only predicted counts as 0.
    - ``pixel_accuracy``: share of the labelled pixels that are right.
    - ``mean_pixel_accuracy``: mean of the per-class accuracy over the classes in the ground truth.
    - ``iou/<class>``, for each class that counts in ``miou``; ``accuracy/<class>``, share of that class's
      pixels that are right, for each class in the ground truth. A class without a value has no key: JSON has no NaN.

    Args:
        read: gives predicted and true class indices, int64 (N, H, W), labels already checked.
        class_names: one name per class.
        ignore_index: true label that does not count.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    confusion: Tensor

    def __init__(self, read: Read, class_names: Sequence[str], ignore_index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.read = read
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index
        classes = len(self.class_names)
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Any, target: Sample) -> None:
        """Adds a batch to the confusion matrix (row: truth, column: prediction)."""
        prediction, truth = self.read(output, target)
        valid = truth != self.ignore_index
        classes = len(self.class_names)
        pairs = truth[valid] * classes + prediction[valid]
        self.confusion += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)

    def compute(self) -> dict[str, float]:
        """Returns the metrics named above.

        Raises:
            DataError: not one labelled pixel was seen.
        """
        confusion = self.confusion.to("cpu", torch.float64)
        total = confusion.sum()
        if total == 0:
            raise DataError(
                f"no labelled pixel was seen (every label was {self.ignore_index}, the ignored one, or no batch was "
                "given), so there is nothing to measure; check ignore_index and the data set's length"
            )
        right, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        union = truth + predicted - right
        iou, accuracy = right / union, right / truth
        values = {
            "miou": float(iou[union > 0].mean()),
            "pixel_accuracy": float(right.sum() / total),
            "mean_pixel_accuracy": float(accuracy[truth > 0].mean()),
        }
        values |= {f"iou/{name}": float(iou[i]) for i, name in enumerate(self.class_names) if union[i] > 0}
        values |= {f"accuracy/{name}": float(accuracy[i]) for i, name in enumerate(self.class_names) if truth[i] > 0}
        return values


class DepthMetrics(Metric):
    """Metrics of a monocular depth estimate, each computed per image and averaged over the images.

    With p the prediction, g the ground truth, d = ln p − ln g and means over an image's valid pixels (Eigen et al.,
    arXiv 1406.2283, section 4.3): ``absrel`` mean |p − g| / g; ``sqrel`` mean (p − g)² / g; ``rmse`` √mean (p − g)²;
    ``rmse_log`` √mean d²; ``log10`` mean |log10 p − log10 g|; ``silog`` √(mean d² − (mean d)²), not times 100;
    ``delta1..3`` share of pixels with max(p/g, g/p) < 1.25, 1.25², 1.25³. rmse is in the unit of the depth.

    Args:
        read: gives predicted and true depth (N, H, W).
        min_depth, max_depth: only ground truth inside this range counts; predictions are clamped to it.
        median_scaling: multiply each predicted image by median(g) / median(p) over its valid pixels first, for models
            or data without a metric scale.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    sums: Tensor
    images: Tensor

    def __init__(
        self, read: Read, *, min_depth: float, max_depth: float, median_scaling: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.read = read
        self.min_depth, self.max_depth, self.median_scaling = min_depth, max_depth, median_scaling
        self.add_state("sums", torch.zeros(len(DEPTH_NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Any, target: Sample) -> None:
        """Adds a batch; an image without a valid pixel has no metrics and is not counted."""
        prediction, truth = self.read(output, target)
        valid = torch.isfinite(truth) & (truth >= self.min_depth) & (truth <= self.max_depth) & (truth > 0)
        for image, depth, mask in zip(prediction.double(), truth.double(), valid, strict=True):
            if mask.any():
                self.sums += self._image(image[mask], depth[mask])
                self.images += 1

    def _image(self, p: Tensor, g: Tensor) -> Tensor:
        if self.median_scaling:
            p = p * (g.median() / p.median())
        p = p.clamp(self.min_depth, self.max_depth)
        d = p.log() - g.log()
        ratio = torch.maximum(p / g, g / p)
        return torch.stack(
            [
                ((p - g).abs() / g).mean(),
                ((p - g).square() / g).mean(),
                (p - g).square().mean().sqrt(),
                d.square().mean().sqrt(),
                (p.log10() - g.log10()).abs().mean(),
                (d - d.mean()).square().mean().sqrt(),
                *((ratio < 1.25**k).double().mean() for k in (1, 2, 3)),
            ]
        )

    def compute(self) -> dict[str, float]:
        """Returns the metrics named above.

        Raises:
            DataError: no image had a valid pixel.
        """
        if int(self.images) == 0:
            raise DataError(
                f"no image had a depth inside [{self.min_depth:g}, {self.max_depth:g}], so there is nothing to "
                "measure; check the depth's scale (metres per step), min_depth and max_depth"
            )
        means = (self.sums / self.images).tolist()
        return dict(zip(DEPTH_NAMES, means, strict=True))
