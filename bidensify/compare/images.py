"""Pictures for the report page: uint8 tensors to small PNG files."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor


def png(picture: Tensor) -> bytes:
    """Encodes ``picture``, uint8 (3, H, W), as PNG.

    Raises:
        ValueError: another shape or dtype.
    """
    from PIL import Image

    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(
            f"got a picture of shape {tuple(picture.shape)} and {picture.dtype}; a picture is uint8 (3, H, W): "
            f"scale to 0-255 and convert first"
        )
    array = np.ascontiguousarray(picture.detach().cpu().permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
