"""Loss terms of a training stage: the task's own and distillation from a full-precision teacher; a registry."""

from __future__ import annotations

from bidensify.losses import terms as _terms
from bidensify.losses.base import LOSSES, Loss, Outputs, register_loss
from bidensify.losses.features import Features
from bidensify.losses.stage import Losses

__all__ = ["LOSSES", "Features", "Loss", "Losses", "Outputs", "register_loss"]

del _terms  # it is imported for what it registers
