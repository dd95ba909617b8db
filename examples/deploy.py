"""From a student to a small device: pack and save here; load in a fresh process and time it against float.

python examples/deploy.py
python examples/deploy.py runs/deploy       # the second half alone, as the device would run it
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer

import bidensify as bd
from bidensify.models import build_model

FLOAT = "smp:Unet/resnet34"


def save(folder: Path) -> None:
    """Writes the packed network; your trained student stands where this one has only been calibrated."""
    student = bd.bidensify(build_model(FLOAT, classes=11))
    bd.calibrate(student, [torch.randn(2, 3, 96, 96)])
    bd.save_pretrained(bd.pack(student), folder)


@torch.inference_mode()
def milliseconds(model: nn.Module, size: int) -> float:
    """Returns the median time of one image of ``size`` × ``size`` pixels on one thread."""
    scope = {"model": model.eval(), "x": torch.randn(1, 3, size, size)}
    return 1000 * Timer("model(x)", globals=scope, num_threads=1).blocked_autorange(min_run_time=1).median


def load(folder: Path, size: int = 512) -> None:
    """Reads the network back, with no data and no forward pass, and prints its time and float's."""
    packed = bd.from_pretrained(folder)
    print(f"file    {(folder / 'model.safetensors').stat().st_size:,} bytes")
    print(f"float   {milliseconds(build_model(FLOAT, classes=11), size):.1f} ms")
    print(f"packed  {milliseconds(packed, size):.1f} ms")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    else:
        save(Path("runs/deploy"))
        subprocess.run([sys.executable, __file__, "runs/deploy"], check=True)
