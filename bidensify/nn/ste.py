"""Sign functions with straight-through estimators (STE), for activations and for weights.

Everywhere sign(0) = +1 (and sign(-0.0) = +1): a third state cannot be packed into one bit.

Sources: Bi-Real Net (Liu et al., ECCV 2018, eq. 6) for the piecewise polynomial; Binarized Neural Networks
(Hubara et al., NeurIPS 2016, eq. 4) for the clipped identity; XNOR-Net (Rastegari et al., ECCV 2016) for the
per-output-channel scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["binarize_weight", "clipped_sign", "polynomial_sign", "sign", "threshold_sign"]


def sign(x: Tensor) -> Tensor:
    """±1 in the dtype of ``x``, with sign(0) = +1. No gradient.

    Shape: any, kept.
    """
    # -0.0 + 0.0 is +0.0, so copysign never sees a negative zero.
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x.detach() + 0.0)


def _above(x: Tensor, beta: Tensor) -> Tensor:
    """``x - beta`` without a -0.0, so that copysign alone gives sign(0) = +1."""
    # 0.0 - beta is no -0.0, and a sum is -0.0 only where both its terms are.
    return x + (0.0 - beta)


class _ThresholdSign(torch.autograd.Function):
    """alpha * sign(x - beta); keeps only x (already alive), beta and alpha for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor, alpha: Tensor, polynomial: bool) -> Tensor:
        ctx.save_for_backward(x, beta, alpha)
        ctx.polynomial = polynomial
        return torch.copysign(alpha, _above(x, beta))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, beta, alpha = ctx.saved_tensors
        shifted = _above(x, beta)
        grad_alpha = None
        if ctx.needs_input_grad[2]:
            signs = torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), shifted)
            grad_alpha = signs.mul_(grad).sum_to_size(alpha.shape)
        distance = shifted.abs_()
        if ctx.polynomial:
            # d/dx of 2x + x^2 on [-1, 0) and 2x - x^2 on [0, 1) is 2 * (1 - |x|), and 0 outside.
            window = distance.neg_().add_(1).clamp_(min=0)
            grad_x = window.mul_(grad).mul_(2 * alpha)
        else:
            grad_x = torch.where(distance <= 1, grad, grad.new_zeros(())).mul_(alpha)
        grad_beta = None
        if ctx.needs_input_grad[1]:
            # sum_to_size gives grad_x itself where the shapes are equal: not in place.
            grad_beta = grad_x.sum_to_size(beta.shape).neg()
        return (grad_x if ctx.needs_input_grad[0] else None), grad_beta, grad_alpha, None


def threshold_sign(x: Tensor, beta: Tensor, alpha: Tensor, *, polynomial: bool = True) -> Tensor:
    """alpha * sign(x - beta), differentiable in all three.

    Forward: ``alpha`` where x >= beta, ``-alpha`` elsewhere. Backward: to x through the Bi-Real polynomial window
    2 * max(0, 1 - |x - beta|) (``polynomial=True``) or through 1[|x - beta| <= 1]; to beta with the opposite sign,
    summed over what it was broadcast to; to alpha exactly.

    Args:
        x: any shape.
        beta: thresholds, broadcastable to ``x``, same dtype.
        alpha: positive scale, broadcastable to ``x``, same dtype.
        polynomial: the estimator's window.
    """
    result: Tensor = _ThresholdSign.apply(x, beta, alpha, polynomial)
    return result


def polynomial_sign(x: Tensor) -> Tensor:
    """sign(x) with the Bi-Real estimator: gradient 2 * max(0, 1 - |x|). Shape: any, kept."""
    return threshold_sign(x, x.new_zeros(()), x.new_ones(()), polynomial=True)


def clipped_sign(x: Tensor) -> Tensor:
    """sign(x) with the clipped identity: gradient 1[|x| <= 1]. Shape: any, kept."""
    return threshold_sign(x, x.new_zeros(()), x.new_ones(()), polynomial=False)


class _BinarizeWeight(torch.autograd.Function):
    """scale * sign(w), keeping the latent weight itself and the scale only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return torch.copysign(scale, weight + 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, scale = ctx.saved_tensors
        return torch.where(weight.abs() <= 1, grad * scale, grad.new_zeros(())), None


def binarize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """scale * sign(weight). The scale takes no gradient; the weight's is grad * scale * 1[|weight| <= 1].

    Args:
        weight: latent weight, any shape.
        scale: non-negative, broadcastable to ``weight``.
    """
    result: Tensor = _BinarizeWeight.apply(weight, scale.detach())
    return result
