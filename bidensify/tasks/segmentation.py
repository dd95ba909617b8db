"""Semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bidensify.errors import ConfigError, DataError
from bidensify.tasks import losses, pictures
from bidensify.tasks.base import Sample, auxiliary_output, raw_output, resize, target_of
from bidensify.tasks.metrics import SegmentationMetrics


class SegmentationTask:
    """Cross-entropy (and optionally Dice) training, mIoU evaluation.

    Args:
        num_classes: C, at least 2.
        ignore_index: label of pixels that count neither in the loss nor in the metrics.
        class_weights: C weights of the cross-entropy.
        class_names: C names for the metrics; ``class_0`` ... by default.
        palette: C colours (r, g, b) for pictures.
        dice: weight of the Dice loss beside the cross-entropy.
        aux_weight: weight of the loss of an auxiliary head (torchvision's ``aux``), where the model has one.
        check_labels: look for labels outside the classes in every batch. On a GPU this waits for the device once a
            step; without it such a label ends the process in a device assertion.

    Raises:
        ConfigError: an option is out of range, or a list does not have C entries.
    """

    name = "segmentation"
    primary = "miou"
    higher_is_better = True

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
        lists = {"class_weights": class_weights, "class_names": class_names or None, "palette": palette}
        for option, values in lists.items():
            if values is not None and len(values) != num_classes:
                raise ConfigError(f"{option} has {len(values)} entries for {num_classes} classes; give one per class")
        if class_weights is not None and (min(class_weights) < 0 or max(class_weights) == 0):
            raise ConfigError(f"class_weights is {list(class_weights)}; weights are at least 0 and not all 0")
        for option, value in (("dice", dice), ("aux_weight", aux_weight)):
            if value < 0:
                raise ConfigError(f"{option} is {value}; a loss weight is at least 0")
        if len(set(class_names)) != len(class_names):
            raise ConfigError(f"class_names is {list(class_names)}; each class needs a name of its own")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        self.class_names = tuple(class_names) or tuple(f"class_{i}" for i in range(num_classes))
        self.palette: tuple[pictures.Colour, ...] = (
            pictures.default_palette(num_classes) if palette is None else tuple((c[0], c[1], c[2]) for c in palette)
        )
        self.dice = dice
        self.aux_weight = aux_weight
        self.check_labels = check_labels

    def logits(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the class scores (N, C, H, W) of a model's output, resized bilinearly to ``size``.

        Raises:
            ConfigError: there is no such tensor in ``output``, or it does not have C channels.
        """
        logits = raw_output(output)
        self._channels(logits)
        return resize(logits, size)

    def _channels(self, logits: Tensor) -> None:
        if logits.shape[1] != self.num_classes:
            raise ConfigError(
                f"the model's prediction has {logits.shape[1]} channels (shape {tuple(logits.shape)}) for "
                f"{self.num_classes} classes; build the model with as many classes as the data set has"
            )

    def labels(self, target: Sample, batch: int) -> Tensor:
        """Returns the target's class indices, int64 (N, H, W).

        Raises:
            ConfigError: the sample has no mask, or one of a wrong shape.
            DataError: a label is neither a class nor ``ignore_index``.
        """
        mask = target_of(target, "mask", self.name, batch).long()
        if self.check_labels:
            wrong = ((mask < 0) | (mask >= self.num_classes)) & (mask != self.ignore_index)
            if wrong.any():
                image, row, column = (int(index) for index in wrong.nonzero()[0])
                values = sorted(set(mask[wrong].tolist()))
                raise DataError(
                    f"image {image} of the batch has the label {int(mask[image, row, column])} at row {row}, column "
                    f"{column} (labels outside the classes in this batch: {values[:8]}); labels are 0 to "
                    f"{self.num_classes - 1}, or {self.ignore_index} for pixels to ignore. Set num_classes and "
                    "ignore_index as the data set has them, or map its labels"
                )
        return mask

    def loss(self, output: Any, target: Sample) -> Tensor:
        """Returns cross-entropy + dice · Dice + aux_weight · (the same on the auxiliary head), over labelled pixels.

        Args:
            output: what the model returned.
            target: ``mask`` int64 (N, H, W); the logits are resized to it.

        Returns:
            A scalar; 0 if no pixel is labelled.
        """
        logits = self.logits(output)
        mask = self.labels(target, len(logits))
        size = (mask.shape[1], mask.shape[2])
        loss = self._loss(resize(logits, size), mask)
        auxiliary = auxiliary_output(output) if self.aux_weight else None
        if auxiliary is not None:
            self._channels(auxiliary)
            loss = loss + self.aux_weight * self._loss(resize(auxiliary, size), mask)
        return loss

    def _loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        weight = None if self.class_weights is None else self.class_weights.to(logits)
        loss = losses.cross_entropy(logits, mask, ignore_index=self.ignore_index, weight=weight)
        if self.dice:
            loss = loss + self.dice * losses.dice_loss(logits, mask, ignore_index=self.ignore_index)
        return loss

    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the most likely class of each pixel, int64 (N, H, W); scores are resized before the choice."""
        return self.logits(output, size).argmax(1)

    def _read(self, output: Any, target: Sample) -> tuple[Tensor, Tensor]:
        logits = self.logits(output)
        mask = self.labels(target, len(logits))
        return resize(logits, (mask.shape[1], mask.shape[2])).argmax(1), mask

    def metrics(self) -> SegmentationMetrics:
        """Returns fresh metrics; see :class:`bidensify.tasks.metrics.SegmentationMetrics`."""
        return SegmentationMetrics(self._read, self.class_names, self.ignore_index)

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
