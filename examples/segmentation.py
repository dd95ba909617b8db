"""Your network and your data: binarize, distil, evaluate, pack, save, load.

    python examples/segmentation.py

The network is one of segmentation_models_pytorch, the data set a plain ``torch.utils.data.Dataset``.
"""

from __future__ import annotations

from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.utils.data import Dataset

import bidensify as bd
from bidensify.recipe import load_recipe
from bidensify.tasks import SegmentationTask
from bidensify.train import evaluate

RECIPE = {
    "name": "blobs",
    "data": {"batch_size": 8},
    "task": {"name": "segmentation", "num_classes": 3},
    "teacher": {"stages": [{"name": "float", "binarize": "none", "epochs": 4, "lr": 2e-3}]},
    "stages": [{"name": "binary", "binarize": "all", "epochs": 6, "lr": 4e-3, "losses": {"task": 1, "kl": 1}}],
    "ema": {"decay": 0.95},
    "log": {"tensorboard": False},
}


class Blobs(Dataset[dict[str, Tensor]]):
    """Bright and dark discs on noise. A sample: "image" (float32, (3, H, W)) and "mask" (int64, (H, W))."""

    def __init__(self, length: int, size: int, seed: int) -> None:
        self.length, self.size, self.seed = length, size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(self.seed + index)
        image = 0.5 * torch.randn(3, self.size, self.size, generator=random)
        mask = torch.zeros(self.size, self.size, dtype=torch.int64)
        y, x = torch.meshgrid(*2 * [torch.linspace(0, 1, self.size)], indexing="ij")
        for label, brightness in ((1, 1.0), (2, -1.0)):
            cy, cx, radius = torch.rand(3, generator=random) * torch.tensor([1, 1, 0.3]) + torch.tensor([0, 0, 0.1])
            inside = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
            image[:, inside] += brightness
            mask[inside] = label
        return {"image": image, "mask": mask}


def main(
    out: Path = Path("runs/example"), size: int = 64, images: int = 160, settings: tuple[str, ...] = ()
) -> dict[str, float]:
    """Returns the mIoU of teacher, student and the packed student read back; ``settings`` change the recipe."""
    recipe, task = load_recipe(RECIPE, settings), SegmentationTask(num_classes=3)
    train, val = Blobs(images, size, seed=0), Blobs(max(8, images // 5), size, seed=1_000_000)

    # You have this already: a trained full-precision network.
    model = smp.Unet("resnet18", encoder_weights=None, classes=3)
    teacher = bd.finetune(model, recipe=recipe.for_teacher(), train=train, val=val, run_dir=out / "teacher")

    student = bd.bidensify(model)
    result = bd.finetune(student, teacher=model, recipe=recipe, train=train, val=val, run_dir=out / "student")

    bd.save_pretrained(bd.pack(student), out / "packed")
    packed = bd.from_pretrained(out / "packed", model)
    return {
        "teacher": teacher.metrics["miou"],
        "student": result.metrics["miou"],
        "packed": evaluate(packed, task, val)["miou"],
    }


if __name__ == "__main__":
    print(main())
