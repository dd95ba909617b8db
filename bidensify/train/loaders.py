"""Loaders whose content depends on (seed, epoch) alone, a look at what they are given, and models on their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bidensify.data.batches import collate
from bidensify.errors import ConfigError, DataError
from bidensify.recipe import Recipe
from bidensify.train.distributed import GlobalBatches

Sample = dict[str, Tensor]


def check_samples(dataset: Dataset[Sample], name: str) -> None:
    """Looks at the first sample of a data set.

    Raises:
        DataError: it is no data set with a length, it is empty, its first sample cannot be read, or is no dict with a
            float "image" of (C, H, W).
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name} is a {type(dataset).__name__}; give a data set with a length and samples by index "
            "(torch.utils.data.Dataset, not an iterable one)"
        )
    if len(dataset) == 0:
        raise DataError(f"{name} is empty; give a data set with samples")
    how = (
        'a sample is a dict with "image" (floating point, (C, H, W), normalized) and what the task needs: "mask" (int64, '
        '(H, W)) or "depth" (float32, (H, W) in metres)'
    )
    with torch.random.fork_rng(devices=[]):
        sample: Any = dataset[0]
    if not isinstance(sample, Mapping) or not isinstance(sample.get("image"), Tensor):
        given = type(sample).__name__
        if isinstance(sample, Mapping):
            given += f" of { ({str(key): type(value).__name__ for key, value in sample.items()}) }"
        raise DataError(f"{name}[0] is a {given}; {how}")
    image = sample["image"]
    if not image.is_floating_point() or image.dim() != 3:
        raise DataError(f'{name}[0]["image"] is {image.dtype} of shape {tuple(image.shape)}; {how}')
    if image.shape[-1] <= 4 < image.shape[0]:
        raise DataError(
            f'{name}[0]["image"] has the shape {tuple(image.shape)}, which looks like (H, W, C); {how}. Turn it with '
            "image.permute(2, 0, 1)"
        )


@contextmanager
def placed(model: nn.Module, device: torch.device, recipe: Recipe) -> Iterator[None]:
    """Has a model on a device, in the recipe's memory format and precision, for the time of the block."""
    home, dtype = next(((p.device, p.dtype) for p in model.parameters()), (torch.device("cpu"), torch.float32))
    memory = torch.channels_last if recipe.channels_last else torch.contiguous_format
    inside = torch.float64 if recipe.precision == "fp64" else dtype
    model.to(device, inside, memory_format=memory)  # type: ignore[call-overload]
    try:
        yield
    finally:
        model.to(home, dtype, memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def batches_per_epoch(dataset: Dataset[Sample], recipe: Recipe) -> int:
    """Returns the number of whole global batches in the training set.

    Raises:
        ConfigError: there is not one.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if length < recipe.data.batch_size:
        raise ConfigError(
            f"data.batch_size is {recipe.data.batch_size}, the training set has {length} samples; use a smaller batch"
        )
    return length // recipe.data.batch_size


def training_loader(
    dataset: Dataset[Sample], recipe: Recipe, epoch: int, accelerator: Accelerator | None = None, *, skip: int = 0
) -> DataLoader[Sample]:
    """Returns this process's share of the epoch's batches, from batch ``skip`` on.

    Without ``accelerator`` every process gets the whole global batches (for calibration).
    """
    set_epoch = getattr(dataset, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    batches = GlobalBatches(
        len(dataset),  # type: ignore[arg-type]
        recipe.data.batch_size,
        seed=recipe.seed,
        epoch=epoch,
        skip=skip,
        rank=accelerator.process_index if accelerator is not None else 0,
        processes=accelerator.num_processes if accelerator is not None else 1,
        parts=recipe.data.accumulate if accelerator is not None else 1,
    )
    # Its own generator: making an iterator must not draw from the run's, which a resumed run restores. It is what workers
    # seed their generators from, and those of an augmentation that keeps one for itself, so no epoch repeats another.
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=recipe.data.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available() and recipe.device != "cpu",
        generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch),
    )
