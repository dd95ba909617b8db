"""A segmentation network in Python without torch: NumPy and the C++ runtime alone.

bidensify runtime build --out runtime        # once, where bidensify is; on the device the folder is enough (with ExecuTorch's
                                             # four libraries beside it: see README)
python examples/deploy_python_without_torch.py net.pte photo.jpg mask.png --runtime runtime
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

parser = argparse.ArgumentParser()
parser.add_argument("net", type=Path, help="what `bidensify export RUN net.pte` wrote")
parser.add_argument("image", type=Path)
parser.add_argument("mask", type=Path)
parser.add_argument("--runtime", type=Path, default=Path("runtime"), help="what `bidensify runtime build` wrote")
parser.add_argument("--threads", type=int, default=0)
given = parser.parse_args()

# ExecuTorch's own `executorch.runtime` imports torch; this file lies beside the library and does not.
sys.path.insert(0, str(given.runtime))
from bidensify_program import Program  # noqa: E402

net = Program(given.net, threads=given.threads)
((_, channels, height, width), dtype) = net.inputs[0]
mean = net.constant("image_mean") or [0.485, 0.456, 0.406]
std = net.constant("image_std") or [0.229, 0.224, 0.225]

with Image.open(given.image) as file:
    picture = file.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
image = (np.asarray(picture, dtype) / np.float32(255) - np.asarray(mean, dtype)) / np.asarray(std, dtype)
image = np.ascontiguousarray(image.transpose(2, 0, 1)[None])

net(image)
start = time.perf_counter()
scores = net(image)[0]
milliseconds = 1000 * (time.perf_counter() - start)

assert "torch" not in sys.modules
if scores.ndim != 4 or scores.shape[1] > 256:
    sys.exit(
        f"{given.net}: its output {scores.shape} is not (1, classes, H, W) with at most 256 classes, as a mask's bytes hold"
    )
# One channel is a score for or against.
mask = (scores[0, 0] > 0 if scores.shape[1] == 1 else scores[0].argmax(0)).astype(np.uint8)
Image.fromarray(mask).save(given.mask)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{given.mask}: {width}x{height}, {milliseconds:.1f} ms on {net.threads} threads, {peak:.1f} MiB at its peak")
for index, count in zip(*np.unique(mask, return_counts=True)):
    print(f"class {index:3d}: {100 * count / mask.size:5.1f} %")
