"""Loss terms of a stage: the task's own and distillation from a full-precision teacher.

Every term is a mean; :meth:`Losses.weights` tells over how many things, so that micro-batches and processes add up to
the mean over the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bidensify.errors import ConfigError
from bidensify.recipe.sections import LossesSection
from bidensify.tasks import Task
from bidensify.train.features import Features

Sample = dict[str, Tensor]


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


def _same_shape(term: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ConfigError(
            f"losses.{term}: student gives {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "distil between outputs and layers of the same shape"
        )


class Losses:
    """The weighted terms of one stage.

    Args:
        section: the terms and weights.
        task: gives the task's loss and reads logits from any output.
        student_features, teacher_features: recorded layers, needed by ``cwd.layers`` and ``features``.
    """

    def __init__(
        self,
        section: LossesSection,
        task: Task,
        student_features: Features | None = None,
        teacher_features: Features | None = None,
    ) -> None:
        self.section, self.task = section, task
        self._student, self._teacher = student_features, teacher_features
        named = {name: getattr(section, name) for name in ("task", "kl", "cwd", "features", "kd_l1")}
        self.factors: dict[str, float] = {name: term.weight for name, term in named.items() if term is not None}

    @property
    def names(self) -> list[str]:
        """Names of the terms, in the order of :meth:`weights` and :meth:`values`."""
        return list(self.factors)

    def weights(self, target: Sample) -> Tensor:
        """Returns, per term, how many things of ``target`` it is a mean over; float64 (terms,)."""
        samples = float(target["image"].shape[0])
        return torch.stack([self._weight(name, target, samples) for name in self.factors])

    def _weight(self, name: str, target: Sample, samples: float) -> Tensor:
        device = target["image"].device
        if name == "task":
            return loss_weight(self.task, target).double().to(device)
        if name == "kl" and self.section.kl is not None and self.section.kl.ignore:
            return self._valid(target).sum().double()
        return torch.tensor(samples, dtype=torch.float64, device=device)

    def _valid(self, target: Sample, size: tuple[int, int] | None = None) -> Tensor:
        mask = target["mask"]
        if size is not None and mask.shape[-2:] != size:
            mask = F.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0].long()
        return mask != getattr(self.task, "ignore_index", -100)

    def values(self, output: Any, target: Sample, teacher_output: Any = None) -> list[Tensor]:
        """Returns the scalars of all terms, each the mean over this micro-batch, before weighting."""
        values = []
        for name in self.factors:
            if name == "task":
                values.append(self.task.loss(output, target))
            elif name == "kd_l1":
                values.append(self._depth(output, teacher_output))
            elif name == "features" or (name == "cwd" and self.section.cwd is not None and self.section.cwd.layers):
                values.append(self._features(name))
            else:
                values.append(self._logits(name, output, teacher_output, target))
        return values

    def _logits(self, name: str, output: Any, teacher_output: Any, target: Sample) -> Tensor:
        student, teacher = self.task.logits(output), self.task.logits(teacher_output)
        _same_shape(name, student, teacher)
        if name == "cwd":
            assert self.section.cwd is not None
            return cwd_loss(student, teacher, self.section.cwd.temperature)
        assert self.section.kl is not None
        size = (student.shape[-2], student.shape[-1])
        valid = self._valid(target, size) if self.section.kl.ignore else None
        return kl_loss(student, teacher, self.section.kl.temperature, valid)

    def _features(self, name: str) -> Tensor:
        assert self._student is not None
        assert self._teacher is not None
        total = []
        for path in self._student.paths(getattr(self.section, name).layers):
            student, teacher = self._student[path], self._teacher[path]
            _same_shape(f"{name} at layer {path!r}", student, teacher)
            if name == "cwd":
                assert self.section.cwd is not None
                total.append(cwd_loss(student, teacher, self.section.cwd.temperature))
            else:
                assert self.section.features is not None
                total.append(feature_loss(student, teacher, self.section.features.kind))
        return torch.stack(total).mean()

    def _depth(self, output: Any, teacher_output: Any) -> Tensor:
        assert self.section.kd_l1 is not None
        student, teacher = self.task.logits(output), self.task.logits(teacher_output)
        _same_shape("kd_l1", student, teacher)
        log_depth = getattr(self.task, "log_depth", None)
        if self.section.kd_l1.log and callable(log_depth):
            # Unlike a prediction, which is clamped to the depths that count, it has a gradient everywhere.
            difference: Tensor = log_depth(student) - log_depth(teacher)
            return difference.abs().mean()
        return depth_l1(self.task.predict(output), self.task.predict(teacher_output), self.section.kd_l1.log)


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
