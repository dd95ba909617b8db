"""Thresholds, BatchNorm statistics and ranges of int8 layers from a few batches, so that no layer starts blind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from bidensify.errors import ConfigError
from bidensify.nn.binary_layer import binary_layers
from bidensify.nn.dab import statistics_dtype
from bidensify.nn.int8 import int8_layers

__all__ = ["calibrate", "normalized_by"]


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def normalized_by(norm: _BatchNorm, x: Tensor) -> Tensor:
    """(2, C): mean and biased variance that a norm in training mode, of momentum 1, has just normalized ``x`` (N, C, *) by."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    values = x.numel() // norm.num_features
    if isinstance(norm, nn.SyncBatchNorm) and distributed.is_initialized():
        values *= distributed.get_world_size(norm.process_group)
    dtype = statistics_dtype(norm.running_var)
    return torch.stack([norm.running_mean.to(dtype), norm.running_var.to(dtype) * (1 - 1 / values)])


@contextmanager
def _averages(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """While it lasts, norms in training mode note what they normalize by; then their running statistics are the averages.

    The variance is the biased one, by which a batch is normalized. torch keeps n / (n - 1) times as much, n values a
    channel: on small maps evaluation then computes something else than training did, and each sign that flips for it
    flips others further on.
    """
    sums: dict[_BatchNorm, Tensor] = {}
    calls: Counter[_BatchNorm] = Counter()

    def note(norm: _BatchNorm, args: tuple[Tensor, ...], output: Any) -> None:
        found = normalized_by(norm, args[0])
        sums[norm] = sums[norm] + found if norm in sums else found
        calls[norm] += 1

    hooks = [norm.register_forward_hook(note) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
        yield
        for norm, (mean, variance) in sums.items():
            norm.running_mean.copy_(mean / calls[norm])  # type: ignore[union-attr]
            norm.running_var.copy_(variance / calls[norm])  # type: ignore[union-attr]
            norm.num_batches_tracked.fill_(calls[norm])  # type: ignore[union-attr]
    finally:
        for hook in hooks:
            hook.remove()


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Any, ...] | Mapping[str, Any]],
    *,
    thresholds: bool = True,
    norms: bool = True,
) -> None:
    """Sets binarizer thresholds so that each channel's signs are mixed, then re-estimates BatchNorm statistics.

    The ranges of int8 layers' inputs are those of the last pass over the batches.

    Thresholds are set in forward order within one pass, each from inputs that the thresholds before it made.
    BatchNorm running statistics become the plain averages, over the batches, of the mean and the (biased) variance that
    each batch is normalized by: after one batch, evaluation on it computes what training does. A norm that is not called
    keeps its own. The model's train/eval flags and BatchNorm momenta are left as they were; dropout stays off.

    Args:
        model: any network with binary layers (with none, only the norms are re-estimated).
        batches: inputs of the model: a tensor, a tuple of positional or a mapping of keyword arguments each.
        thresholds: set the binarizers' thresholds.
        norms: re-estimate BatchNorm's running mean and variance.

    Raises:
        ConfigError: there is no batch, a batch holds values that are not finite, or a batch stands where a list of
            batches is asked for.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"calibrate: batches is a {type(batches).__name__}; give a list of batches, [batch], or a data loader"
        )
    inputs = list(batches)
    if not inputs:
        raise ConfigError("calibrate: no batch was given; pass at least one batch of the network's inputs")
    for number, batch in enumerate(inputs):
        leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
            raise ConfigError(
                f"calibrate: batch {number} holds NaN or infinity, which no statistic survives; leave it out"
            )
    training = {module: module.training for module in model.modules()}
    norm_layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    momenta = [module.momentum for module in norm_layers]
    ranges = [layer.int8 for _, layer in int8_layers(model) if layer.int8 is not None]

    def run_all() -> None:
        for part in ranges:
            part.begin_calibration()
        for batch in inputs:
            _run(model, batch)
        for part in ranges:
            part.end_calibration()

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
                run_all()
                for _, layer in binary_layers(model):
                    layer.binarizer.end_calibration()
            if norms:
                with _averages(norm_layers):
                    run_all()
    finally:
        for part in ranges:
            part.end_calibration()
        for _, layer in binary_layers(model):
            layer.binarizer.end_calibration()
        for norm, momentum in zip(norm_layers, momenta):
            norm.momentum = momentum
        for each, flag in training.items():
            each.training = flag
