"""How many channels the images of a network have."""

from __future__ import annotations

from torch import nn

from bidensify.rewrite.record.inputs import candidate_inputs

__all__ = ["image_channels"]


def image_channels(model: nn.Module) -> int:
    """Returns the channels of the image that the network is recorded on; 3 where it takes none."""
    args, kwargs = next(candidate_inputs(model))
    images = [value for value in (*args, *kwargs.values()) if getattr(value, "ndim", 0) == 4]
    return int(images[0].shape[1]) if images else 3
