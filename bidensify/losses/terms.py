"""The loss terms that come with bidensify.

Every term is a mean, and says over how many things, so that micro-batches and processes add up to the mean over the
global batch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bidensify.errors import ConfigError
from bidensify.losses.base import Loss, Outputs, register_loss, same_shape
from bidensify.tasks import Sample, Task
from bidensify.tasks.outputs import target_of


def widen(x: Tensor) -> Tensor:
    """Returns half-precision tensors in float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """Logit distillation (Hinton et al., arXiv 1503.02531): T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Args:
        student, teacher: class logits (N, C, H, W); classes in dimension 1.
        temperature: T.
        valid: booleans (N, H, W); pixels that are False do not count. All pixels count by default.

    Returns:
        The mean over the counted pixels, a scalar; 0 if there are none.
    """
    log_p = F.log_softmax(widen(student) / temperature, dim=1)
    log_q = F.log_softmax(widen(teacher) / temperature, dim=1)
    per_pixel = (log_q.exp() * (log_q - log_p)).sum(1) * temperature**2
    if valid is None:
        return per_pixel.mean()
    return (per_pixel * valid).sum() / valid.sum().clamp(min=1)


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation (Shu et al., arXiv 2011.13256, equation 4), averaged over samples.

    Each channel's map becomes a distribution over space by a softmax; L = T^2 / C sum_c KL(teacher_c || student_c).

    Args:
        student, teacher: (N, C, H, W), logits or features.
        temperature: T.
    """
    log_p = F.log_softmax(widen(student).flatten(2) / temperature, dim=2)
    log_q = F.log_softmax(widen(teacher).flatten(2) / temperature, dim=2)
    return (log_q.exp() * (log_q - log_p)).sum(2).mean() * temperature**2


def feature_loss(student: Tensor, teacher: Tensor, kind: str = "mse") -> Tensor:
    """Distance of two feature maps (N, C, *) whose scales do not matter.

    "mse": squared distance of the channel vectors, each divided by its length, averaged over samples and positions,
    which is 2 (1 - cosine). "attention": attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928, with p = 2):
    squared distance of the maps sum_c x_c^2, each divided by its length, averaged over samples.
    """
    a, b = widen(student).flatten(2), widen(teacher).flatten(2)
    if kind == "attention":
        return (F.normalize(a.square().sum(1), dim=1) - F.normalize(b.square().sum(1), dim=1)).square().sum(1).mean()
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()


def depth_l1(student: Tensor, teacher: Tensor, log: bool = True) -> Tensor:
    """Mean absolute difference of two depth maps (any equal shape, positive), or of their natural logarithms."""
    if log:
        student, teacher = widen(student).clamp(min=1e-6).log(), widen(teacher).clamp(min=1e-6).log()
    return (widen(student) - widen(teacher)).abs().mean()


def loss_weight(task: Task, target: Sample) -> Tensor:
    """Returns how much of a task's loss is in ``target``: what local means are weighted with for a global mean.

    A task may say so itself (method ``loss_weight(target) -> Tensor``). Else it is, for masks, the labelled pixels,
    each times its class weight (as in the cross-entropy; a Dice part is not a mean over pixels, and is taken per
    process), for depth, the images with a valid pixel (as in SILog), and for anything else the images.
    """
    own = getattr(task, "loss_weight", None)
    if callable(own):
        result: Tensor = own(target)
        return result
    if "mask" in target:
        mask = target["mask"].long()
        valid = mask != getattr(task, "ignore_index", -100)
        weights: Tensor | None = getattr(task, "class_weights", None)
        if weights is None:
            return valid.sum()
        inside = torch.where(valid, mask, torch.zeros_like(mask)).clamp(0, len(weights) - 1)
        return (weights.to(mask.device)[inside].double() * valid).sum()
    if "depth" not in target:
        return torch.tensor(target["image"].shape[0])
    depth = target["depth"].flatten(1)
    valid = task.valid(depth) if hasattr(task, "valid") else depth > 0
    return valid.any(1).sum()


@register_loss("task")
class TaskLoss(Loss):
    """The task's own loss against the labels."""

    distils: ClassVar[bool] = False

    def value(self, outputs: Outputs, target: Sample, task: Task) -> Tensor:
        """Returns ``task.loss``."""
        return task.loss(outputs.student, target)

    def count(self, target: Sample, task: Task) -> Tensor:
        """Returns how much of the task's loss is in ``target``; see :func:`loss_weight`."""
        return loss_weight(task, target)


class _OnLogits(Loss):
    """Base of terms on the two networks' raw predictions (N, C, H, W)."""

    def logits(self, outputs: Outputs, task: Task) -> tuple[Tensor, Tensor]:
        """Returns the student's and the teacher's."""
        student, teacher = task.logits(outputs.student), task.logits(outputs.teacher)
        same_shape(student, teacher)
        return student, teacher


@register_loss("kl")
class KlLoss(_OnLogits):
    """KL(teacher || student) of the class distributions per pixel, times temperature squared; see :func:`kl_loss`.

    ``ignore`` leaves out pixels without a label.
    """

    temperature: float = Field(default=1.0, gt=0)
    ignore: bool = False

    def value(self, outputs: Outputs, target: Sample, task: Task) -> Tensor:
        """Returns the mean over pixels."""
        student, teacher = self.logits(outputs, task)
        size = (student.shape[-2], student.shape[-1])
        return kl_loss(student, teacher, self.temperature, _labelled(task, target, size) if self.ignore else None)

    def count(self, target: Sample, task: Task) -> Tensor:
        """Returns the images, or the labelled pixels with ``ignore``."""
        return _labelled(task, target).sum() if self.ignore else super().count(target, task)

    def check(self, outputs: Outputs, target: Sample, task: Task) -> None:
        """Asks for two classes or more, which exclude one another."""
        student, _ = self.logits(outputs, task)
        if student.shape[1] >= 2:
            _asks_for(task, "classes", "a distribution over classes that exclude one another", "bce, kd_l1 or l1")
        else:
            raise ConfigError(
                f"the prediction has one channel (shape {tuple(student.shape)}), and a distribution over one class is 1 "
                "everywhere, so its KL divergence is 0; use bce for one logit (foreground or not), kd_l1 for a depth map, "
                "l1 for other values"
            )
        if self.ignore and "mask" not in target:
            raise ConfigError(f"ignore: true needs a mask in each sample, which has {sorted(target)}; leave it out")
        super().check(outputs, target, task)


@register_loss("bce")
class BceLoss(_OnLogits):
    """Binary cross-entropy of each channel's logit to the teacher's probability, less the teacher's own entropy.

    For one logit (foreground or not) and for several labels at once, which are no distribution over classes.
    """

    temperature: float = Field(default=1.0, gt=0)

    def value(self, outputs: Outputs, target: Sample, task: Task) -> Tensor:
        """Returns T^2 KL(Bernoulli(teacher / T) || Bernoulli(student / T)), the mean over channels and pixels."""
        student, teacher = (widen(x) / self.temperature for x in self.logits(outputs, task))
        share = teacher.sigmoid()
        cross = F.binary_cross_entropy_with_logits(student, share)
        return (cross - F.binary_cross_entropy_with_logits(teacher, share)) * self.temperature**2

    def check(self, outputs: Outputs, target: Sample, task: Task) -> None:
        """Asks for labels that do not exclude one another."""
        _asks_for(task, "labels", "a probability per channel", "kl, kd_l1 or l1")
        super().check(outputs, target, task)


@register_loss("l1")
class L1Loss(_OnLogits):
    """Mean absolute difference of the raw predictions: flow, restoration, anything that is a value."""

    def value(self, outputs: Outputs, target: Sample, task: Task) -> Tensor:
        """Returns the mean over all values."""
        student, teacher = self.logits(outputs, task)
        return F.l1_loss(widen(student), widen(teacher))


class _OnLayers(_OnLogits):
    """Base of terms that compare layers of the same names."""

    def pairs(self, outputs: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Returns (student's, teacher's) outputs of each layer."""
        found = []
        for path, student in outputs.student_features.items():
            teacher = outputs.teacher_features[path]
            same_shape(student, teacher, f"at layer {path!r} ")
            found.append((student, teacher))
        return found


@register_loss("cwd")
class CwdLoss(_OnLayers):
    """Channel-wise distillation (arXiv 2011.13256) of the class scores, or of the named ``layers``."""

    temperature: float = Field(default=4.0, gt=0)
    layers: list[str] = Field(default_factory=list)

    def value(self, outputs: Outputs, target: Sample, task: Task) -> Tensor:
        """Returns the mean over layers of :func:`cwd_loss`."""
        pairs = self.pairs(outputs) if self.layers else [self.logits(outputs, task)]
        return torch.stack([cwd_loss(student, teacher, self.temperature) for student, teacher in pairs]).mean()

    def check(self, outputs: Outputs, target: Sample, task: Task) -> None:
        """Asks for scores per class, unless layers are named."""
        if not self.layers and getattr(task, "outputs", "classes") == "values":
            raise ConfigError(
                f"what the task {task.name!r} gives is no score per class; name the layers to compare (cwd.layers), or use "
                "kd_l1 or l1"
            )
        super().check(outputs, target, task)


@register_loss("features")
class FeatureLoss(_OnLayers):
    """Feature matching between layers of the same names in student and teacher; see :func:`feature_loss`."""

    layers: list[str] = Field(min_length=1)
    kind: Literal["mse", "attention"] = "mse"

    def value(self, outputs: Outputs, target: Sample, task: Task) -> Tensor:
        """Returns the mean over layers."""
        return torch.stack([feature_loss(s, t, self.kind) for s, t in self.pairs(outputs)]).mean()


@register_loss("kd_l1")
class KdL1Loss(_OnLogits):
    """L1 between the student's and the teacher's depth, by default between their logarithms."""

    log: bool = True

    def value(self, outputs: Outputs, target: Sample, task: Task) -> Tensor:
        """Returns the mean over pixels."""
        student, teacher = self.logits(outputs, task)
        log_depth = getattr(task, "log_depth", None)
        if self.log and callable(log_depth):
            # Unlike a prediction, which is clamped to the depths that count, it has a gradient everywhere.
            difference: Tensor = log_depth(student) - log_depth(teacher)
            return difference.abs().mean()
        return depth_l1(task.predict(outputs.student), task.predict(outputs.teacher), self.log)

    def check(self, outputs: Outputs, target: Sample, task: Task) -> None:
        """Asks for a task whose prediction is a depth."""
        if not callable(getattr(task, "log_depth", None)):
            raise ConfigError(f"it compares depths, and the task is {task.name!r}; use kl, bce or l1")
        super().check(outputs, target, task)


def _asks_for(task: Task, kind: str, what: str, instead: str) -> None:
    found = getattr(task, "outputs", kind)
    if found != kind:
        raise ConfigError(f"it compares {what}, and the task {task.name!r} gives {found}; use {instead}")


def _labelled(task: Task, target: Sample, size: tuple[int, int] | None = None) -> Tensor:
    mask = target_of(target, "mask", task.name, len(target["mask"]))
    if size is not None and mask.shape[-2:] != size:
        mask = F.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0].long()
    return mask != getattr(task, "ignore_index", -100)
