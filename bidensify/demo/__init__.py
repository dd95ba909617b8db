"""The demo: a small network, a generated data set and one job that runs the whole of bidensify in minutes.

``network`` holds the U-Net behind the model spec ``"demo:unet"``; ``job`` is what ``bidensify demo`` runs.
"""

from __future__ import annotations

from bidensify.models.unet import UNet, unet

__all__ = ["UNet", "unet"]
