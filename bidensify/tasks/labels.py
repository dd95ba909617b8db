"""Labels that do not exclude each other: binary segmentation with one logit, and multi-label segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bidensify.data.base import DataInfo
from bidensify.errors import ConfigError
from bidensify.tasks import losses, pictures
from bidensify.tasks.base import DenseTask, Sample
from bidensify.tasks.outputs import target_of
from bidensify.tasks.registry import register_task
from bidensify.tasks.segmentation import check_labels, check_lists, check_weights, class_options

if TYPE_CHECKING:
    from bidensify.tasks.metrics import LabelMetrics


@register_task("multilabel")
class MultiLabelTask(DenseTask):
    """Multi-label segmentation: any number of labels per pixel. BCE + Dice training, mean IoU evaluation.

    The network has one channel per label; a sample's mask has one plane of 0 and 1 per label. Metrics, each the mean over
    the labels: ``iou`` (selects), ``dice``, ``precision``, ``recall``, ``pixel_accuracy``; and ``iou/LABEL``,
    ``dice/LABEL``.

    Args:
        num_classes: number of labels; by default the data set's.
        ignore_index: value of pixels that do not count; by default the data set's.
        class_names: names for the metrics; by default the data set's.
        palette: colours (r, g, b) for pictures; by default the data set's.
        bce, dice: weights of binary cross-entropy and soft Dice loss.
        pos_weight: one weight per label of the cross-entropy where it holds, for labels that are rare.
        threshold: probability from which on a label holds.
        aux_weight: weight of the loss of each auxiliary head, where the network has some.

    Raises:
        ConfigError: an option is out of range, or a list has not one entry per label.

    Example:
        ::

            task: {name: multilabel, bce: 1, dice: 1, threshold: 0.4, pos_weight: [1, 5, 20]}

        What the data set does not say::

            name: multilabel
            num_classes: 2
            class_names: [crack, stain]
            palette: [[255, 0, 0], [0, 0, 255]]
            ignore_index: 255
            aux_weight: 0.2
    """

    name = "multilabel"
    primary = "iou"
    higher_is_better = True
    outputs = "labels"

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        class_names: Sequence[str] = (),
        palette: Sequence[Sequence[int]] | None = None,
        bce: float = 1.0,
        dice: float = 1.0,
        pos_weight: Sequence[float] | None = None,
        threshold: float = 0.5,
        aux_weight: float = 0.4,
    ) -> None:
        if num_classes < 1:
            raise ConfigError(f"num_classes is {num_classes}; give at least 1 label")
        check_lists(num_classes, class_names, palette=palette, pos_weight=pos_weight)
        check_weights(bce=bce, dice=dice, aux_weight=aux_weight, pos_weight=min(pos_weight or [0]))
        if not 0 < threshold < 1 or bce + dice == 0:
            raise ConfigError(
                f"threshold={threshold}, bce={bce}, dice={dice}; the threshold is a probability between 0 and 1, and one of "
                "the two losses has a weight"
            )
        self.channels = num_classes
        self.ignore_index, self.threshold = ignore_index, threshold
        self.class_names = tuple(class_names) or tuple(f"class_{i}" for i in range(num_classes))
        self.palette = pictures.colours(num_classes, palette)
        self.bce, self.dice, self.aux_weight = bce, dice, aux_weight
        self.pos_weight = None if pos_weight is None else torch.tensor(list(pos_weight), dtype=torch.float32)

    @classmethod
    def options_from(cls, info: DataInfo) -> dict[str, Any]:
        """Labels, their names and colours, and the ignored value are the data set's."""
        return class_options(info)

    def truth(self, target: Sample, batch: int) -> Tensor:
        """Returns the target's planes of 0, 1 and ``ignore_index``, int64 (N, labels, H, W).

        Raises:
            ConfigError: the sample has no such mask.
            DataError: a value is neither 0, 1 nor ``ignore_index``.
        """
        planes = target_of(target, "mask", self.name, batch, planes=self.channels).long()
        check_labels(planes.flatten(0, 1), 2, self.ignore_index)
        return planes

    def loss_of(self, raw: Tensor, truth: Tensor, target: Sample) -> Tensor:
        """Returns bce · cross-entropy + dice · Dice over the pixels that count; 0 if none does."""
        valid, there = truth != self.ignore_index, (truth == 1).to(raw.dtype)
        loss = raw.new_zeros(())
        if self.bce:
            weight = None if self.pos_weight is None else self.pos_weight.to(raw)
            loss = loss + self.bce * losses.binary_cross_entropy(raw, there, valid, weight=weight)
        return loss + self.dice * losses.binary_dice_loss(raw, there, valid) if self.dice else loss

    def loss_weight(self, target: Sample) -> Tensor:
        """The pixels that count, of every label (a Dice part is no mean over pixels: taken per process)."""
        return (target["mask"] != self.ignore_index).sum()

    def decide(self, raw: Tensor) -> Tensor:
        """Returns which labels hold, uint8 (N, labels, H, W)."""
        return (raw.sigmoid() >= self.threshold).to(torch.uint8)

    def metrics(self) -> LabelMetrics:
        """Returns fresh metrics; see :class:`bidensify.tasks.metrics.LabelMetrics`."""
        from bidensify.tasks.metrics import LabelMetrics

        return LabelMetrics(self.read, self.class_names, self.ignore_index)

    def picture(self, image: Tensor | None, output_or_target: Any, *, blend: float = 0.0) -> Tensor:
        """Colours one prediction or one target with the mean of its labels' colours.

        Args:
            image: uint8 (3, H, W), whose size the picture takes, or None.
            output_or_target: a sample with ``mask``; integer planes (labels, H, W); or a model's output for one image.
            blend: share of the image mixed in, 0 to 1.

        Returns:
            uint8 (3, H, W) on the CPU; pixels without a label are black.
        """
        found = output_or_target
        if isinstance(found, dict) and "mask" in found:
            found = found["mask"]
        if not isinstance(found, Tensor) or found.is_floating_point():
            size = None if image is None else (image.shape[-2], image.shape[-1])
            found = self.predict(found, size)
        planes = found.reshape(-1, *found.shape[-2:])
        return pictures.finish(pictures.colour_labels(planes, self.palette), image, blend)


@register_task("binary")
class BinaryTask(MultiLabelTask):
    """Binary segmentation: foreground or not. BCE + Dice training, IoU of the foreground as evaluation.

    The network has one channel, a logit; masks hold 0, 1 and ``ignore_index`` (masks of 0 and 255 need the data set's
    ``label_map: {255: 1}``). Metrics: ``iou`` (selects), ``dice``, ``precision``, ``recall``, ``pixel_accuracy``.

    Args:
        ignore_index: label of pixels that do not count; by default the data set's.
        class_name: what the foreground is called; by default the name of the data set's class 1.
        colour: (r, g, b) of the foreground in pictures; by default that of the data set's class 1.
        bce, dice: weights of binary cross-entropy and soft Dice loss.
        pos_weight: weight of the foreground in the cross-entropy, for a foreground that is rare.
        threshold: probability from which on a pixel is foreground.
        aux_weight: weight of the loss of each auxiliary head, where the network has some.

    Raises:
        ConfigError: an option is out of range.

    Example:
        ::

            task: {name: binary, bce: 1, dice: 1, pos_weight: 3, threshold: 0.5, aux_weight: 0.4}

        What the data set does not say::

            task: {name: binary, class_name: leaf, colour: [0, 200, 0], ignore_index: 255}
    """

    name = "binary"

    def __init__(
        self,
        ignore_index: int = 255,
        class_name: str = "foreground",
        colour: Sequence[int] = (255, 255, 255),
        bce: float = 1.0,
        dice: float = 1.0,
        pos_weight: float | None = None,
        threshold: float = 0.5,
        aux_weight: float = 0.4,
    ) -> None:
        weights = None if pos_weight is None else [pos_weight]
        super().__init__(1, ignore_index, [class_name], [colour], bce, dice, weights, threshold, aux_weight)

    @classmethod
    def options_from(cls, info: DataInfo) -> dict[str, Any]:
        """The ignored label, and name and colour of class 1, are the data set's.

        Raises:
            ConfigError: the data has another number of classes.
        """
        if not info.num_classes:
            return {}
        if info.num_classes != 2:
            raise ConfigError(
                f"the task 'binary' is for data of 2 classes, this has {info.num_classes}; use 'segmentation'"
            )
        return {"ignore_index": info.ignore_index, "class_name": info.class_names[1], "colour": info.palette[1]}

    def truth(self, target: Sample, batch: int) -> Tensor:
        """Returns the target's 0, 1 and ``ignore_index``, int64 (N, 1, H, W); see :meth:`MultiLabelTask.truth`."""
        mask = target_of(target, "mask", self.name, batch).long()
        check_labels(mask, 2, self.ignore_index)
        return mask[:, None]

    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns 0 and 1, int64 (N, H, W); the logit is resized to ``size`` first."""
        return super().predict(output, size)[:, 0].long()
