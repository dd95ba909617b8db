"""What a dense-prediction task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from bidensify.data.base import DataInfo, Sample
from bidensify.errors import ConfigError
from bidensify.tasks.outputs import auxiliary_outputs, raw_output, resize, restore

__all__ = ["DenseTask", "Outputs", "Sample", "Task", "TaskMetrics"]

# What a network's channels are: scores of classes that exclude each other (softmax), of labels that do not (sigmoid per
# channel), or values.
Outputs = Literal["classes", "labels", "values"]


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

    ``primary`` names the metric that selects a checkpoint; ``higher_is_better`` its direction. Of a task that is no
    :class:`DenseTask` its output is taken to be scores of classes where the samples have a mask, and values elsewhere.
    """

    name: str
    primary: str
    higher_is_better: bool

    def loss(self, output: Any, target: Sample) -> Tensor:
        """Returns the scalar training loss."""

    def logits(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the raw prediction (N, C, H, W), resized bilinearly to ``size`` if that is given."""

    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the final prediction: class indices (N, H, W), depth (N, H, W), or what else the task predicts."""

    def metrics(self) -> TaskMetrics:
        """Returns fresh running metrics."""

    def picture(self, image: Tensor | None, output_or_target: Any) -> Tensor:
        """Returns a colour picture, uint8 (3, H, W), of one prediction or one target."""


class DenseTask(ABC):
    """What the tasks here have in common: reading outputs, auxiliary heads, and sizes.

    A sub-class gives :meth:`truth`, :meth:`loss_of`, :meth:`decide`, :meth:`metrics`, :meth:`picture` and
    :meth:`loss_weight`.

    Attributes:
        outputs: what the network's channels are.
        channels: how many the network must have; None for any number.
        main: which of a list of predictions is the one: 0 or -1.
        aux_weight: weight of the loss of each auxiliary head.
    """

    name: ClassVar[str]
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool]
    outputs: ClassVar[Outputs] = "values"
    main: ClassVar[int] = 0
    channels: int | None
    aux_weight: float = 0.4

    @classmethod
    def options_from(cls, info: DataInfo) -> dict[str, Any]:
        """Returns the options that a data set answers, for a recipe that does not give them."""
        return {}

    @abstractmethod
    def truth(self, target: Sample, batch: int) -> Tensor:
        """Returns the target's tensor, (N, H, W) or (N, C, H, W), checked.

        Raises:
            ConfigError: the sample does not have it, or it has another shape.
            DataError: a value is out of range.
        """

    @abstractmethod
    def loss_of(self, raw: Tensor, truth: Tensor, target: Sample) -> Tensor:
        """Returns the scalar loss of one raw prediction (N, C, H, W) at the truth's size."""

    @abstractmethod
    def loss_weight(self, target: Sample) -> Tensor:
        """Returns over how many things of ``target`` the loss is a mean: weights that make local means a global one."""

    @abstractmethod
    def decide(self, raw: Tensor) -> Tensor:
        """Returns the final prediction of a raw one (N, C, H, W)."""

    def logits(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the raw prediction (N, C, H, W) of a model's output, resized bilinearly to ``size``.

        Raises:
            ConfigError: there is no such tensor in ``output``, or it does not have the task's channels.
        """
        raw = raw_output(output, self.main)
        self._check_channels(raw)
        return self.resize(raw, size)

    def _check_channels(self, raw: Tensor) -> None:
        if self.channels is not None and raw.shape[1] != self.channels:
            advice = f"build the model with {self.channels} (classes or num_classes={self.channels})"
            if self.name == "segmentation" and (self.channels, raw.shape[1]) == (2, 1):
                advice += ", or use the task 'binary', which takes one logit"
            raise ConfigError(
                f"the model's prediction has {raw.shape[1]} channels (shape {tuple(raw.shape)}), the task {self.name!r} needs "
                f"{self.channels}; {advice}"
            )

    def resize(self, raw: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Resizes a raw prediction."""
        return resize(raw, size)

    def loss(self, output: Any, target: Sample) -> Tensor:
        """Returns the loss of the prediction, plus ``aux_weight`` times that of each auxiliary head.

        Args:
            output: what the model returned.
            target: the collated sample; predictions are resized to it.

        Returns:
            A scalar; 0 where nothing in ``target`` counts.
        """
        raw = self.logits(output)
        truth = self.truth(target, len(raw))
        size = (truth.shape[-2], truth.shape[-1])
        loss = self.loss_of(self.resize(raw, size), truth, target)
        for other in auxiliary_outputs(output, self.main) if self.aux_weight else ():
            self._check_channels(other)
            loss = loss + self.aux_weight * self.loss_of(self.resize(other, size), truth, target)
        return loss

    def predict(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        """Returns the final prediction; the raw one is resized to ``size`` first."""
        return self.decide(self.logits(output, size))

    def read(self, output: Any, target: Sample) -> tuple[Tensor, Tensor]:
        """Returns final prediction and truth, both at the truth's size, for metrics."""
        raw = self.logits(output)
        truth = self.truth(target, len(raw))
        return self.decide(self.restore(raw, target.get("extent"), (truth.shape[-2], truth.shape[-1]))), truth

    def restore(self, raw: Tensor, extent: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Brings a raw prediction back to the image's size; see :func:`bidensify.tasks.restore`."""
        return restore(raw, extent, size)

    @abstractmethod
    def metrics(self) -> TaskMetrics:
        """Returns fresh running metrics."""

    @abstractmethod
    def picture(self, image: Tensor | None, output_or_target: Any) -> Tensor:
        """Returns a colour picture, uint8 (3, H, W), of one prediction or one target."""
