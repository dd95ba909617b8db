"""Thresholds and BatchNorm statistics from a few batches, so that no binarizer starts blind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.nn.layer import binary_layers

__all__ = ["calibrate"]


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Any, ...] | Mapping[str, Any]],
    *,
    thresholds: bool = True,
    norms: bool = True,
) -> None:
    """Sets binarizer thresholds so that each channel's signs are mixed, then re-estimates BatchNorm statistics.

    Thresholds are set in forward order within one pass, each from inputs that the thresholds before it made.
    BatchNorm running statistics become the plain average over the batches. The model's train/eval flags and
    BatchNorm momenta are left as they were; dropout stays off.

    Args:
        model: any network with binary layers (with none, only the norms are re-estimated).
        batches: inputs of the model: a tensor, a tuple of positional or a mapping of keyword arguments each.
        thresholds: set the binarizers' thresholds.
        norms: re-estimate BatchNorm's running mean and variance.

    Raises:
        ConfigError: there is no batch.
    """
    inputs = list(batches)
    if not inputs:
        raise ConfigError("calibrate: no batch was given; pass at least one batch of the network's inputs")
    training = {module: module.training for module in model.modules()}
    norm_layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    momenta = [module.momentum for module in norm_layers]
    try:
        model.eval()
        # Thresholds need the statistics that training will see, and running statistics of the float network are not
        # those of the binary one: batch statistics in both passes.
        for module in norm_layers:
            module.train()
        with torch.no_grad():
            if thresholds:
                for _, layer in binary_layers(model):
                    layer.binarizer.begin_calibration()
                for module in norm_layers:
                    module.momentum = 0.0
                for batch in inputs:
                    _run(model, batch)
                for _, layer in binary_layers(model):
                    layer.binarizer.end_calibration()
            if norms:
                for module in norm_layers:
                    module.reset_running_stats()
                    module.momentum = None
                for batch in inputs:
                    _run(model, batch)
    finally:
        for _, layer in binary_layers(model):
            layer.binarizer.end_calibration()
        for norm, momentum in zip(norm_layers, momenta):
            norm.momentum = momentum
        for each, flag in training.items():
            each.training = flag
