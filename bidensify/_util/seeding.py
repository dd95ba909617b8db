"""Random numbers that depend on a seed alone and leave the caller's where they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU's generator for what runs within, and puts it back at the end.

    The generators of GPUs are left alone; ``torch.manual_seed`` would seed them too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
