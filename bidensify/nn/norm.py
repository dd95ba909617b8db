"""BatchNorm beside binary layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.exact.fold import Affine, batch_norm
from bidensify.nn.contract import Declares, quiet

__all__ = ["BatchNormLast", "fusible_norm", "make_norm"]


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


def fusible_norm(norm: nn.Module, y: Tensor, dim: int) -> bool:
    """Whether ``kernels.autograd.post`` does what calling ``norm`` on ``y`` would do."""
    if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or not norm.affine or norm.weight.dtype != torch.float32:
        return False
    if type(norm).forward is not (nn.BatchNorm2d if dim == 1 else BatchNormLast).forward or not quiet(norm):
        return False
    batch = norm.training or not norm.track_running_stats
    # Gradients through running statistics, a batch of one value (an error) and modes that watch torch's functions
    # (statistics over several processes) are left to torch.
    return (
        y.shape[dim] == norm.num_features
        and (batch or not torch.is_grad_enabled())
        and y.numel() // y.shape[dim] > 1
        and torch._C._len_torch_function_stack() == 0
    )
