"""All terms of one stage, weighted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bidensify.errors import ConfigError
from bidensify.losses.base import Loss, Outputs
from bidensify.losses.features import Features
from bidensify.tasks import Sample, Task


class Losses:
    """The weighted terms of one stage.

    Args:
        terms: the terms by name.
        task: gives the task's loss and reads logits from any output.
        student_features, teacher_features: recorded layers, needed by terms with ``layers``.
    """

    def __init__(
        self,
        terms: Mapping[str, Loss],
        task: Task,
        student_features: Features | None = None,
        teacher_features: Features | None = None,
    ) -> None:
        self.terms, self.task = dict(terms), task
        self._student, self._teacher = student_features, teacher_features
        self.factors: dict[str, float] = {name: term.weight for name, term in self.terms.items()}

    @property
    def names(self) -> list[str]:
        """Names of the terms, in the order of :meth:`weights` and :meth:`values`."""
        return list(self.terms)

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return any(term.distils for term in self.terms.values())

    def weights(self, target: Sample) -> Tensor:
        """Returns, per term, how many things of ``target`` it is a mean over; float64 (terms,)."""
        device = target["image"].device
        return torch.stack([term.count(target, self.task).double().to(device) for term in self.terms.values()])

    def values(self, output: Any, target: Sample, teacher_output: Any = None) -> list[Tensor]:
        """Returns the scalars of all terms, each the mean over this micro-batch, before weighting.

        Raises:
            ConfigError: the networks' outputs are not what a term compares.
        """
        return [
            self._told(name, term.value, self._outputs(term, output, teacher_output), target)
            for name, term in self.terms.items()
        ]

    def forget(self) -> None:
        """Drops the features of the pass before."""
        for features in (self._student, self._teacher):
            if features is not None:
                features.forget()

    def check(self, output: Any, target: Sample, teacher_output: Any = None) -> None:
        """Looks whether each term can work on these outputs.

        Raises:
            ConfigError: one cannot; see :meth:`Loss.check`.
        """
        for name, term in self.terms.items():
            self._told(name, term.check, self._outputs(term, output, teacher_output), target)

    def _told(self, name: str, function: Any, outputs: Outputs, target: Sample) -> Any:
        try:
            return function(outputs, target, self.task)
        except ConfigError as error:
            raise ConfigError(f"losses.{name}: {error}") from error

    def _outputs(self, term: Loss, output: Any, teacher_output: Any) -> Outputs:
        patterns = getattr(term, "layers", None)
        if not patterns or self._student is None or self._teacher is None:
            return Outputs(output, teacher_output)
        paths = self._student.paths(patterns)
        student, teacher = ({path: features[path] for path in paths} for features in (self._student, self._teacher))
        return Outputs(output, teacher_output, student, teacher)
