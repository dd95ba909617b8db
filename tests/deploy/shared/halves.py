"""Networks in 16 bits, which some files do not take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.models.unet import unet

__all__ = ["refused_half"]


def refused_half(suffix: str, dtype: torch.dtype, how: str, folder: Path) -> None:
    """The export of a network that is "packed so", or "moved" to this type afterwards, says what to give in its place."""
    student = bd.bidensify(unet(width=8), example_inputs=torch.randn(2, 3, 64, 64)).eval()
    net = bd.pack(student, float_dtype=dtype) if how == "packed so" else bd.pack(student).to(dtype)
    x = torch.randn(1, 3, 64, 64).to(torch.float32 if how == "packed so" else dtype)
    with pytest.raises(
        ConfigError, match=f"net{suffix}: the network or its input is {dtype}, .*give a float32 network"
    ):
        bd.export(net, folder / f"net{suffix}", example_inputs=x)
    assert not list(folder.iterdir())
