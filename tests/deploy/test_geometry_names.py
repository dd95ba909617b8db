"""A packed layer still says what geometry it has: code around a convolution reads it."""

from __future__ import annotations

import torch

import bidensify as bd
from bidensify.nn import BiDenseConv2d


def test_packed_layers_keep_their_geometrys_names() -> None:
    layer = BiDenseConv2d(8, 16, (3, 5), stride=(2, 1), padding=1, dilation=(1, 2), groups=4).eval()
    packed = bd.pack(torch.nn.Sequential(layer))[0]
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
        assert getattr(packed, name) == getattr(layer, name), name
