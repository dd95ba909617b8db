"""BatchNorm beside binary layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.exact.fold import Affine, batch_norm
from bidensify.nn.contract import Declares

__all__ = ["BatchNormLast", "make_norm"]


class BatchNormLast(Declares, nn.BatchNorm1d):
    """BatchNorm over the last dimension: (..., C), statistics over all other dimensions."""

    def folded(self) -> Affine | None:
        """Scale and shift by the running statistics."""
        return batch_norm(self)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(input.shape)


def make_norm(channels: int, weight_scale: Tensor | None = None, like: Tensor | None = None) -> nn.BatchNorm2d:
    """A BatchNorm2d on the device and in the dtype of ``like``; ``weight_scale`` (C,) starts its weight."""
    norm = nn.BatchNorm2d(channels)
    if weight_scale is not None:
        with torch.no_grad():
            norm.weight.copy_(weight_scale)
    return norm if like is None else norm.to(device=like.device, dtype=like.dtype)
