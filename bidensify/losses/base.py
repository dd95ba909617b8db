"""What a loss term is: a class whose fields are its options in a recipe, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils import _pytree as pytree

from bidensify._util.registry import Registry
from bidensify.errors import ConfigError
from bidensify.tasks import Sample, Task

__all__ = ["LOSSES", "Loss", "Outputs", "register_loss", "same_shape"]


@dataclass(frozen=True)
class Outputs:
    """What the terms of a step look at.

    Attributes:
        student: what the student returned; ``task.logits(...)`` reads it.
        teacher: what the teacher returned; None where no term distils.
        student_features, teacher_features: outputs (N, C, *) of the layers that the term's ``layers`` match, by path.
    """

    student: Any
    teacher: Any = None
    student_features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(BaseModel):
    """Base of every loss term. The fields of a sub-class are its options; ``weight`` is every term's factor.

    A term that compares layers has a field ``layers`` (paths or globs, the same in student and teacher).
    ``distils`` says whether the term needs a teacher.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    distils: ClassVar[bool] = True

    weight: float = Field(default=1.0, gt=0)

    def value(self, outputs: Outputs, target: Sample, task: Task) -> Tensor:
        """Returns the term, a scalar: a mean over what :meth:`count` counts in this (micro-)batch."""
        raise NotImplementedError

    def count(self, target: Sample, task: Task) -> Tensor:
        """Returns over how many things the value is a mean, so that parts of a batch add up; by default the images."""
        return torch.tensor(float(len(target["image"])))

    def check(self, outputs: Outputs, target: Sample, task: Task) -> None:
        """Looks, before a run, whether the term can do anything with these networks and samples.

        A sub-class that knows why it could not says so; this asks for a gradient at what the student gives.

        Raises:
            ConfigError: the term has none, whatever the student gives, so it would train nothing.
        """
        leaves: list[Tensor] = []

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            # A little off what it is: a student that starts as its teacher has a gradient of 0 in the very place.
            generator = torch.Generator().manual_seed(len(leaves))
            noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            spread = value.detach().float().std().nan_to_num(1.0).clamp(min=1e-3)
            leaf = (value.detach() + 0.1 * noise * spread.to(value.dtype)).requires_grad_()
            leaves.append(leaf)
            return leaf

        with torch.enable_grad():
            student = pytree.tree_map(moved, outputs.student)
            features = {path: moved(tensor) for path, tensor in outputs.student_features.items()}
            value = self.value(replace(outputs, student=student, student_features=features), target, task)
            grads = torch.autograd.grad(value, leaves, allow_unused=True) if leaves and value.requires_grad else ()
        counts = float(self.count(target, task)) > 0
        if counts and leaves and not any(grad is not None and bool(grad.any()) for grad in grads):
            shapes = [tuple(leaf.shape) for leaf in leaves[:3]]
            raise ConfigError(
                f"it is {float(value.detach()):.4g} with a gradient of 0, whatever the student gives (tensors of {shapes}), so "
                "it would train nothing; leave it out or take a loss that fits the task"
            )


LOSSES: Registry[type[Loss]] = Registry("loss", "bidensify.register_loss")


def register_loss(name: str) -> Callable[[type[Loss]], type[Loss]]:
    """Registers a sub-class of :class:`Loss` as the term ``name`` of a stage's ``losses``.

    A name that is known goes to the newer class, with a warning.

    Raises:
        ConfigError: the name is no text, or what is decorated is no sub-class of Loss.
    """

    def register(cls: type[Loss]) -> type[Loss]:
        if not (isinstance(cls, type) and issubclass(cls, Loss)):
            raise ConfigError(f"register_loss({name!r}): {cls!r} must be a sub-class of bidensify.losses.Loss")
        return LOSSES.register(name)(cls)

    return register


def same_shape(student: Tensor, teacher: Tensor, where: str = "") -> None:
    """Raises ConfigError where two tensors that are to be compared have different shapes."""
    if student.shape != teacher.shape:
        raise ConfigError(
            f"{where}student gives {tuple(student.shape)}, teacher {tuple(teacher.shape)}; distil between outputs and "
            "layers of the same shape"
        )
