"""Batches of samples: collation, and transfer to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from bidensify.data.base import Sample
from bidensify.errors import DataError

__all__ = ["collate", "collate_alike", "to_device"]


def _plain(sample: Mapping[str, Any]) -> Sample:
    return {key: value.as_subclass(Tensor) for key, value in sample.items() if isinstance(value, Tensor)}


def _shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in sample.items()}


def collate(samples: Sequence[dict[str, Any]]) -> Sample:
    """Stacks the tensors of samples; tv_tensors become plain ones, what is no tensor (a file name) is left out.

    Raises:
        DataError: the samples differ in their keys or shapes.
    """
    plain = [_plain(sample) for sample in samples]
    for sample in plain:
        if _shapes(sample) != _shapes(plain[0]):
            raise DataError(
                f"samples of one training batch differ: {_shapes(plain[0])} and {_shapes(sample)}; crop or resize them to one "
                "size in the data set, or use data.batch_size: 1"
            )
    batch: Sample = default_collate(plain)
    return batch


def collate_alike(samples: Sequence[dict[str, Any]]) -> list[Sample]:
    """Stacks samples into as many batches as they have shapes: images may be of several sizes where none is cropped."""
    groups: dict[str, list[Sample]] = {}
    for sample in map(_plain, samples):
        groups.setdefault(repr(_shapes(sample)), []).append(sample)
    return [default_collate(group) for group in groups.values()]


def to_device(batch: Sample, device: torch.device, channels_last: bool, model: nn.Module) -> Sample:
    """Moves a batch; images take the memory format, and single or double precision as ``model`` has it."""
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    if moved["image"].dtype in (torch.float32, torch.float64):
        moved["image"] = moved["image"].to(torch.float64 if wide else torch.float32)
    if channels_last and moved["image"].ndim == 4:
        moved["image"] = moved["image"].contiguous(memory_format=torch.channels_last)
    return moved
