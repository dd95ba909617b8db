"""Networks by name ("smp:Unet/resnet34", "package.module:factory"), and their weights from files."""

from __future__ import annotations

from bidensify.models import libraries as _libraries
from bidensify.models.build import build_model, code_of, model_sources, rebuild_model, register_source
from bidensify.models.weights import load_weights

__all__ = ["build_model", "code_of", "load_weights", "model_sources", "rebuild_model", "register_source"]

del _libraries  # it is imported for what it registers
