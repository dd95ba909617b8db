"""Augmentation as a function of (seed, epoch, index) alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bidensify._util.seeding import seeded
from bidensify.data.base import DataInfo, DenseDataset, Sample


class Seeded(Dataset[Sample]):
    """Makes a data set's augmentation a function of (seed, epoch, index) alone.

    Each sample is read with the generators of PyTorch (CPU), NumPy (``numpy.random.*``) and ``random`` seeded anew and
    put back afterwards. Order, number of workers, number of processes and earlier draws have no influence, so that a
    resumed run sees the samples that an uninterrupted one sees. A generator that a transform keeps for itself
    (``numpy.random.default_rng()``) is out of reach.

    Args:
        dataset: any data set with a length.
        seed: any integer.

    Attributes:
        info: the data set's, or None where it is one of the user's own without.
    """

    def __init__(self, dataset: DenseDataset | Dataset[Sample], seed: int) -> None:
        self.dataset = dataset
        self.info: DataInfo | None = getattr(dataset, "info", None)
        self.seed = int(seed)
        # Shared memory, because the workers of a persistent loader keep the copy that they started with.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, for running worker processes too; call it before the loader is iterated."""
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        seed = _mix(self.seed, self.epoch, int(index) % max(len(self), 1))
        with seeded(seed), _others_seeded(seed):
            return self.dataset[index]


@contextmanager
def _others_seeded(seed: int) -> Iterator[None]:
    """Seeds NumPy's and Python's global generators for what runs within, and puts them back at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _mix(*values: int) -> int:
    """Hashes integers to 63 bits (SplitMix64's finaliser, once per value): close inputs give unrelated seeds."""
    state = 0
    for value in values:
        state = (state ^ (value & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
