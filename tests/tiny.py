"""A small task that trains in a second, and a program that trains it in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.data import DataInfo, DenseDataset, Sample
from bidensify.data.count import Count
from bidensify.nn import BiDenseConv2d
from bidensify.tasks import SegmentationTask

TASK = SegmentationTask(3)


class Colours(DenseDataset):
    """16 x 16 noise whose classes are the strongest channel; the transform adds noise; some pixels are ignored.

    ``fail_at`` stops at that read, counted from when the file ``after`` is there (the log of a run that has begun).
    """

    info = DataInfo(3, ("red", "green", "blue"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))

    def __init__(
        self, length: int = 40, seed: int = 0, delay: float = 0.0, fail_at: int | None = None, after: Path | None = None
    ) -> None:
        super().__init__(_noise if seed == 0 else None)
        self.length, self.seed, self.delay, self.fail_at, self.after, self.reads = (
            length,
            seed,
            delay,
            fail_at,
            after,
            1,
        )

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Sample:
        self.reads += self.after is None or self.after.exists()
        if self.reads == self.fail_at:
            raise KeyboardInterrupt
        time.sleep(self.delay)
        return self.make(index)

    def count(self, index: int) -> Count:
        """What the check before training sees; no read that is counted."""
        return Count.of((16, 16), self.make(index))

    def make(self, index: int) -> Sample:
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(self.seed * 10000 + index))
        mask = image.argmax(0)
        mask[: index % 7] = 255  # processes get different numbers of labelled pixels
        return {"image": image, "mask": mask}


def _noise(sample: Sample) -> Sample:
    return {**sample, "image": sample["image"] + 0.1 * torch.randn(3, 16, 16)}


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def network(
    binary: bool = False, channels: int = 8, dropout: float = 0.0, seed: int = 0, depth: int = 2
) -> nn.Sequential:
    """A first and a last layer with ``depth`` layers between them, binary if asked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [BiDenseConv2d(channels, channels, 3, padding=1) if binary else Block(channels) for _ in range(depth)]
        first, last = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 1)
        return nn.Sequential(first, *middle, nn.Dropout(dropout), last)


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe for :class:`Colours`; ``changes`` replace sections."""
    data = {"name": "scenes", "split": "train"}
    return {
        "name": "tiny",
        "model": {"source": "demo:unet"},
        "data": {"train": data, "val": {**data, "split": "val"}, "size": [16, 16], "batch_size": 8},
        "task": {"name": "segmentation"},
        "stages": [{"name": "only", "binarize": "none", "epochs": 2, "lr": 0.01}],
        "log": {"every": 1, "tensorboard": False},
        "device": "cpu",
        **changes,
    }


STUDENT = {
    "stages": [
        {"name": "activations", "binarize": "activations", "epochs": 2, "lr": 0.01, "losses": {"task": 1, "kl": 1}},
        {
            "name": "all",
            "binarize": "all",
            "epochs": 2,
            "lr": 0.01,
            "schedule": "cosine",
            "losses": {
                "task": 1,
                "kl": {"weight": 0.5, "temperature": 2, "ignore": True},
                "features": {"layers": ["1"]},
            },
        },
    ],
    "ema": {"decay": 0.9},
    "optimizer": {"clip": 5.0},
    "calibrate": {"batches": 2},
    "checkpoint": {"steps": 3},
}


def student_run(
    run_dir: str | Path, *, resume: bool = False, changes: dict[str, Any] | None = None, depth: int = 2, **data: Any
) -> Any:
    """Trains a binary network under an (untrained) teacher with :data:`STUDENT`."""
    from bidensify.train import finetune

    return finetune(
        network(binary=True, dropout=0.1 if os.environ.get("TINY_DROPOUT") else 0.0, depth=depth),
        teacher=network(depth=depth),
        recipe=recipe(**{**STUDENT, **(changes or {})}),
        train=Colours(**data, after=Path(run_dir) / "log.jsonl"),
        val=Colours(17, seed=1),  # in uneven batches, and no even share of two processes
        run_dir=run_dir,
        resume=resume,
        task=TASK,
        quiet=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    student_run(sys.argv[1], **json.loads(sys.argv[2]))
