"""Running metrics on torchmetrics; their states are sums, so processes are joined exactly.

Imported where a task makes its metrics: torchmetrics loads torchvision, transformers and scipy, seconds in which a command
that measures nothing would wait.
"""

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


class LabelMetrics(Metric):
    """Metrics of labels that do not exclude each other, from the counts of right and wrong pixels of each.

    ``compute`` gives, each in [0, 1] and as the mean over the labels: ``iou`` TP / (TP + FP + FN); ``dice``
    2 TP / (2 TP + FP + FN), which is F1; ``precision`` TP / (TP + FP); ``recall`` TP / (TP + FN); and ``pixel_accuracy``,
    the share of right decisions. A label in neither truth nor prediction does not count; of several labels,
    ``iou/<label>`` and ``dice/<label>`` are given too.

    Args:
        read: gives predicted and true labels, integer (N, labels, H, W): 0, 1, or ``ignore_index`` in the truth.
        names: of the labels.
        ignore_index: of pixels that do not count.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    counts: Tensor

    def __init__(self, read: Read, names: Sequence[str], ignore_index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.read, self.names, self.ignore_index = read, tuple(names), ignore_index
        self.add_state("counts", torch.zeros(4, len(self.names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Any, target: Sample) -> None:
        """Adds a batch to the counts (TP, FP, FN, TN)."""
        prediction, truth = self.read(output, target)
        valid, yes, real = truth != self.ignore_index, prediction == 1, truth == 1
        kinds = (yes & real, yes & ~real, ~yes & real, ~yes & ~real)
        self.counts += torch.stack([(kind & valid).sum((0, 2, 3)) for kind in kinds])

    def compute(self) -> dict[str, float]:
        """Returns the metrics named above.

        Raises:
            DataError: no label was in the ground truth or predicted.
        """
        tp, fp, fn, tn = self.counts.to("cpu", torch.float64)
        there = tp + fp + fn > 0
        if not there.any():
            raise DataError(
                f"none of {', '.join(self.names)} occurs in the ground truth or in a prediction, so there is nothing to "
                "measure; check the masks (0 and 1, label_map) and the data set's length"
            )
        each = {"iou": tp / (tp + fp + fn), "dice": 2 * tp / (2 * tp + fp + fn)}
        values = {name: float(value[there].mean()) for name, value in each.items()}
        for name, parts, whole in (("precision", tp, tp + fp), ("recall", tp, tp + fn)):
            if (whole > 0).any():
                values[name] = float((parts / whole)[whole > 0].mean())
        values["pixel_accuracy"] = float((tp + tn).sum() / (tp + fp + fn + tn).sum())
        if len(self.names) > 1:
            shown = [(i, name) for i, name in enumerate(self.names) if there[i]]
            values |= {f"{kind}/{name}": float(value[i]) for kind, value in each.items() for i, name in shown}
        return values


class ImageMeans(Metric):
    """Metrics that are computed per image and averaged over the images.

    Args:
        read: gives prediction and ground truth, (N, ...).
        nothing: what to say where no image could be measured.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    names: tuple[str, ...]
    sums: Tensor
    images: Tensor

    def __init__(self, read: Read, nothing: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.read, self.nothing = read, nothing
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def image(self, p: Tensor, g: Tensor) -> Tensor | None:
        """Returns the metrics of one image, float64 (metrics,), from prediction and truth; None if nothing counts."""
        raise NotImplementedError

    def update(self, output: Any, target: Sample) -> None:
        """Adds a batch; an image in which nothing counts has no metrics and is left out."""
        prediction, truth = self.read(output, target)
        for p, g in zip(prediction.double(), truth.double(), strict=True):
            values = self.image(p, g)
            if values is not None:
                self.sums += values
                self.images += 1

    def compute(self) -> dict[str, float]:
        """Returns the metrics by name.

        Raises:
            DataError: no image could be measured.
        """
        if int(self.images) == 0:
            raise DataError(f"{self.nothing}, so there is nothing to measure")
        return dict(zip(self.names, (self.sums / self.images).tolist(), strict=True))


class DepthMetrics(ImageMeans):
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

    higher_is_better = False
    names = DEPTH_NAMES

    def __init__(
        self, read: Read, *, min_depth: float, max_depth: float, median_scaling: bool = False, **kwargs: Any
    ) -> None:
        nothing = (
            f"no image had a depth inside [{min_depth:g}, {max_depth:g}] (check the depth's scale in metres per step, "
            "min_depth and max_depth)"
        )
        super().__init__(read, nothing, **kwargs)
        self.min_depth, self.max_depth, self.median_scaling = min_depth, max_depth, median_scaling

    def image(self, p: Tensor, g: Tensor) -> Tensor | None:
        """Returns the metrics of one depth map (H, W); None without a valid pixel."""
        valid = torch.isfinite(g) & (g >= self.min_depth) & (g <= self.max_depth) & (g > 0)
        if not valid.any():
            return None
        p, g = p[valid], g[valid]
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


class FlowMetrics(ImageMeans):
    """Metrics of an optical flow (N, 2, H, W) in pixels, per image over the pixels whose true flow is finite.

    ``epe`` is the mean length of the difference; ``outliers`` the share of pixels off by more than 3 pixels and 5 % of
    the true length (KITTI's Fl-all, in [0, 1]).
    """

    higher_is_better = False
    names = ("epe", "outliers")

    def image(self, p: Tensor, g: Tensor) -> Tensor | None:
        """Returns the metrics of one flow (2, H, W); None without a valid pixel."""
        valid = torch.isfinite(g).all(0)
        if not valid.any():
            return None
        p, g = p[:, valid], g[:, valid]
        error = (p - g).norm(dim=0)
        return torch.stack([error.mean(), ((error > 3) & (error > 0.05 * g.norm(dim=0))).double().mean()])


class RestorationMetrics(ImageMeans):
    """``psnr`` in dB and ``ssim`` of images (N, C, H, W) in [0, 1], per image, by torchmetrics."""

    higher_is_better = True
    names = ("psnr", "ssim")

    def image(self, p: Tensor, g: Tensor) -> Tensor | None:
        """Returns the metrics of one image (C, H, W)."""
        from torchmetrics.functional.image import peak_signal_noise_ratio as psnr
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        # An exact copy has an infinite ratio, which would swallow every other image's.
        ratio = psnr(p[None], g[None], data_range=1.0).clamp(max=100)
        similar: Any = ssim(p[None], g[None], data_range=1.0)
        return torch.stack([ratio, similar]).double()
