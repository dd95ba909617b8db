"""A 1-bit depth model with transformers' own calls: load, save, load again, pipeline.

    python examples/depth_transformers.py

The weights are random, so that nothing is downloaded; put a checkpoint's name where ``float`` stands.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image
from torch import Tensor
from transformers import AutoModelForDepthEstimation, DPTImageProcessor, GLPNConfig, GLPNForDepthEstimation, pipeline

import bidensify as bd


def main(out: Path) -> Tensor:
    """Returns the depth map (H, W) of a grey image."""
    GLPNForDepthEstimation(GLPNConfig(hidden_sizes=[16, 32, 40, 64], decoder_hidden_size=16)).save_pretrained(
        out / "float"
    )

    # The float checkpoint becomes a 1-bit network while it is loaded; train this one.
    config = bd.BidensifyConfig(rules=(bd.Rule("head.*", "keep"),))
    student = AutoModelForDepthEstimation.from_pretrained(out / "float", quantization_config=config)

    # The configuration that is saved says what the network is: loading needs no argument.
    bd.pack(student).save_pretrained(out / "packed")
    packed = AutoModelForDepthEstimation.from_pretrained(out / "packed")

    processor = DPTImageProcessor(size={"height": 64, "width": 64})
    estimate = pipeline("depth-estimation", model=packed, image_processor=processor)
    depth: Tensor = estimate(Image.new("RGB", (128, 96), "grey"))["predicted_depth"]
    return depth


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(Path(folder)))
