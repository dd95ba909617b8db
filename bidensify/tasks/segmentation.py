"""Semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bidensify.data.base import DataInfo
from bidensify.errors import ConfigError, DataError
from bidensify.tasks import losses, pictures
from bidensify.tasks.base import DenseTask, Sample
from bidensify.tasks.outputs import target_of
from bidensify.tasks.registry import register_task

if TYPE_CHECKING:
    from bidensify.tasks.metrics import SegmentationMetrics


@register_task("segmentation")
class SegmentationTask(DenseTask):
    """Semantic segmentation: one class per pixel. Cross-entropy (and optionally Dice) training, mIoU evaluation.

    The network has one channel per class. Metrics: ``miou`` (selects), ``pixel_accuracy``, ``mean_pixel_accuracy``, and
    ``iou/CLASS`` and ``accuracy/CLASS``.

    Args:
        num_classes: C, at least 2; by default the data set's.
        ignore_index: label of pixels that count neither in the loss nor in the metrics; by default the data set's.
        class_weights: C weights of the cross-entropy.
        class_names: C names for the metrics; by default the data set's.
        palette: C colours (r, g, b) for pictures; by default the data set's.
        dice: weight of the Dice loss beside the cross-entropy.
        aux_weight: weight of the loss of an auxiliary head (torchvision's ``aux``, the rest of a list), where there is one.
        check_labels: look for labels outside the classes in every batch. On a GPU this waits for the device once a
            step; without it such a label ends the process in a device assertion.

    Raises:
        ConfigError: an option is out of range, or a list does not have C entries.

    Example:
        ::

            task: {name: segmentation, num_classes: 3, ignore_index: 255, class_weights: [0.5, 1, 2], dice: 0.5}

        What the data set does not say, and no auxiliary loss::

            name: segmentation
            class_names: [road, car, tree]
            palette: [[128, 64, 128], [64, 0, 128], [0, 128, 0]]
            aux_weight: 0
            check_labels: false
    """

    name = "segmentation"
    primary = "miou"
    higher_is_better = True
    outputs = "classes"

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        class_names: Sequence[str] = (),
        palette: Sequence[Sequence[int]] | None = None,
        dice: float = 0.0,
        aux_weight: float = 0.4,
        check_labels: bool = True,
    ) -> None:
        if num_classes < 2:
            raise ConfigError(f"num_classes is {num_classes}; a segmentation has at least 2, background included")
        check_lists(num_classes, class_names, class_weights=class_weights, palette=palette)
        if class_weights is not None and (min(class_weights) < 0 or max(class_weights) == 0):
            raise ConfigError(f"class_weights is {list(class_weights)}; weights are at least 0 and not all 0")
        check_weights(dice=dice, aux_weight=aux_weight)
        self.num_classes = self.channels = num_classes
        self.ignore_index = ignore_index
        self.class_weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        self.class_names = tuple(class_names) or tuple(f"class_{i}" for i in range(num_classes))
        self.palette = pictures.colours(num_classes, palette)
        self.dice = dice
        self.aux_weight = aux_weight
        self.check_labels = check_labels

    @classmethod
    def options_from(cls, info: DataInfo) -> dict[str, Any]:
        """Classes, their names and colours, and the ignored label are the data set's."""
        return class_options(info)

    def truth(self, target: Sample, batch: int) -> Tensor:
        """Returns the target's class indices, int64 (N, H, W).

        Raises:
            ConfigError: the sample has no mask, or one of a wrong shape.
            DataError: a label is neither a class nor ``ignore_index``.
        """
        mask = target_of(target, "mask", self.name, batch).long()
        if self.check_labels:
            check_labels(mask, self.num_classes, self.ignore_index)
        return mask

    def loss_of(self, raw: Tensor, truth: Tensor, target: Sample) -> Tensor:
        """Returns cross-entropy + dice · Dice over labelled pixels; 0 if no pixel is labelled."""
        weight = None if self.class_weights is None else self.class_weights.to(raw)
        loss = losses.cross_entropy(raw, truth, ignore_index=self.ignore_index, weight=weight)
        if self.dice:
            loss = loss + self.dice * losses.dice_loss(raw, truth, ignore_index=self.ignore_index)
        return loss

    def loss_weight(self, target: Sample) -> Tensor:
        """The labelled pixels, each times its class's weight (a Dice part is no mean over pixels: taken per process)."""
        mask = target["mask"].long()
        valid = mask != self.ignore_index
        if self.class_weights is None:
            return valid.sum()
        inside = torch.where(valid, mask, torch.zeros_like(mask)).clamp(0, self.num_classes - 1)
        return (self.class_weights.to(mask.device)[inside].double() * valid).sum()

    def decide(self, raw: Tensor) -> Tensor:
        """Returns the most likely class of each pixel, int64 (N, H, W)."""
        return raw.argmax(1)

    def metrics(self) -> SegmentationMetrics:
        """Returns fresh metrics; see :class:`bidensify.tasks.metrics.SegmentationMetrics`."""
        from bidensify.tasks.metrics import SegmentationMetrics

        return SegmentationMetrics(self.read, self.class_names, self.ignore_index)

    def picture(self, image: Tensor | None, output_or_target: Any, *, blend: float = 0.0) -> Tensor:
        """Colours one prediction or one target.

        Args:
            image: uint8 (3, H, W), whose size the picture takes, or None.
            output_or_target: a sample with ``mask``; integer labels (H, W); or a model's output for one image.
            blend: share of the image mixed in, 0 to 1.

        Returns:
            uint8 (3, H, W) on the CPU; ignored pixels are black.
        """
        found = output_or_target
        if isinstance(found, dict) and "mask" in found:
            found = found["mask"]
        if isinstance(found, Tensor) and not found.is_floating_point():
            mask = found.reshape(found.shape[-2:])
        else:
            if isinstance(found, Tensor) and found.ndim == 3:
                found = found[None]
            size = None if image is None else (image.shape[-2], image.shape[-1])
            mask = self.predict(found, size)[0]
        return pictures.finish(pictures.colour_mask(mask, self.palette, self.ignore_index), image, blend)


def class_options(info: DataInfo) -> dict[str, Any]:
    """Returns what a data set with masks says about its classes."""
    keys = ("num_classes", "ignore_index", "class_names", "palette") if info.num_classes else ()
    return {key: getattr(info, key) for key in keys}


def check_labels(mask: Tensor, classes: int, ignore_index: int) -> None:
    """Raises DataError where a batch of masks (N, H, W) holds a label that is neither a class nor ``ignore_index``."""
    wrong = ((mask < 0) | (mask >= classes)) & (mask != ignore_index)
    if wrong.any():
        image, row, column = (int(index) for index in wrong.nonzero()[0])
        values = sorted(set(mask[wrong].tolist()))
        raise DataError(
            f"image {image} of the batch has the label {int(mask[image, row, column])} at row {row}, column {column} (labels "
            f"outside the classes in this batch: {values[:8]}); labels are 0 to {classes - 1}, or {ignore_index} for pixels "
            "to ignore. Set the number of classes and ignore_index as the data set has them, or map its labels"
        )


def check_lists(classes: int, class_names: Sequence[str], **lists: Sequence[Any] | None) -> None:
    """Raises ConfigError where a list has not one entry per class, or two classes have one name."""
    for option, values in {**lists, "class_names": class_names or None}.items():
        if values is not None and len(values) != classes:
            raise ConfigError(f"{option} has {len(values)} entries for {classes} classes; give one per class")
    if len(set(class_names)) != len(class_names):
        raise ConfigError(f"class_names is {list(class_names)}; each class needs a name of its own")


def check_weights(**weights: float) -> None:
    """Raises ConfigError where a loss weight is below 0."""
    for option, value in weights.items():
        if value < 0:
            raise ConfigError(f"{option} is {value}; a loss weight is at least 0")
