"""Autograd functions over the training kernels (``training_ops``).

A layer computed this way keeps two activations for its backward pass, its input and the convolution's output, as a
full-precision convolution + BatchNorm + ReLU does: binarized activations and weights are made again when they are needed
(``recompute``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bidensify.kernels import training_ops as ops
from bidensify.kernels.dense import dense

__all__ = ["binarize_rows", "dab", "match", "post"]


def match(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the dtype and memory order of ``like`` (shapes are equal), copied where it differs."""
    if tensor.dtype == like.dtype and (
        tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())
    ):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _match_last(tensor: Tensor, like: Tensor, dim: int) -> Tensor:
    """``tensor`` in the dtype and memory format of ``like``; channel counts differ."""
    last = dim == 1 and not like.is_contiguous()
    tensor = tensor.to(like.dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor.contiguous()


class _Dab(torch.autograd.Function):
    """(x, k, b, a) -> (binary, fused or x itself, statistics)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        k: Tensor,
        b: Tensor,
        a: Tensor,
        scale: int,
        groups: int,
        dim: int,
        owned: bool,
        signs: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        fusing = 0 < groups < x.shape[dim]
        y, fused, statistics = ops.dab(x, k, b, a, scale, groups if fusing else 0, dim, signs)
        if groups == x.shape[dim]:
            fused = x.view_as(x)
        ctx.save_for_backward(x, statistics)
        ctx.scale, ctx.dim, ctx.owned, ctx.shapes = scale, dim, owned, (k.shape, b.shape, a.shape)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return y, fused, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_fused: Tensor | None, _: Any) -> tuple[Any, ...]:
        x, statistics = ctx.saved_tensors
        given, grad = grad, torch.zeros_like(x) if grad is None else match(grad, x)
        grad_x = grad if ctx.owned or grad is not given else torch.empty_like(x)
        if grad_fused is not None:
            grad_fused = _match_last(grad_fused, x, ctx.dim)
        parameters = ops.dab_backward(grad, grad_fused, x, statistics, ctx.scale, ctx.dim, grad_x)
        channels = x.shape[ctx.dim]
        k_shape, b_shape, a_shape = ctx.shapes
        return (
            grad_x,
            parameters[:channels].view(k_shape),
            parameters[channels : 2 * channels].view(b_shape),
            parameters[2 * channels :].view(a_shape) if ctx.needs_input_grad[3] else None,
            None,
            None,
            None,
            None,
            None,
        )


def dab(
    x: Tensor,
    k: Tensor,
    b: Tensor,
    a: Tensor,
    scale: int,
    groups: int,
    dim: int,
    owned: bool = False,
    signs: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The distribution-adaptive binarizer and, with it, the bypass's view of the input.

    Args:
        x: (N, C, ...) with ``dim=1`` or (N, ..., C) with ``dim=-1``, dense.
        scale: of ``training_ops.SCALES``, plus ``TWO_PLANES`` where there are two.
        groups: 0; or C, which passes ``x`` on; or fewer, which gives ``fusion_down(x, groups)``.
        owned: nothing else will see the binarized input's gradient: it may be overwritten.
        signs: False, where channels are innermost: the binarized input is a stand-in that autograd knows, without values.

    Returns:
        The binarized input, the bypass's input (empty for ``groups=0``) and the statistics (4, N, C): mean, beta,
        distance, alpha.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Dab.apply(x, k, b, a, scale, groups, dim, owned, signs)
    return result


class _Post(torch.autograd.Function):
    """act(BatchNorm(x) + bypass) with batch statistics given as ``moments`` (2, C), or no norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bypass: Tensor | None,
        moments: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        bias_in: Tensor | None,
        slope: Tensor | None,
        bias_out: Tensor | None,
        eps: float,
        dim: int,
    ) -> Tensor:
        ctx.eps, ctx.dim = eps, dim
        ctx.bypass_dtype = None if bypass is None else bypass.dtype
        if bypass is not None:
            bypass = match(bypass, x)
        mean, variance = (None, None) if moments is None else moments.unbind(0)
        # The bypass's values decide on which side of the activation an element was; without one they are not needed.
        kept = bypass if slope is not None else None
        ctx.save_for_backward(x, kept, moments, weight, bias, bias_in, slope, bias_out)
        ctx.set_materialize_grads(False)
        y: Tensor = ops.post(x, bypass, mean, variance, weight, bias, bias_in, slope, bias_out, eps, dim)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 10
        x, bypass, moments, weight, bias, bias_in, slope, bias_out = ctx.saved_tensors
        grad = match(grad, x)
        mean, variance = (None, None) if moments is None else moments.unbind(0)
        # Without an activation the bypass takes the gradient as it came.
        wanted = ctx.bypass_dtype is not None and ctx.needs_input_grad[1] and slope is not None
        grad_x, grad_bypass, parameters = ops.post_backward(
            grad, x, bypass, mean, variance, weight, bias, bias_in, slope, bias_out, ctx.eps, ctx.dim, wanted
        )
        if moments is None:
            grad_x = grad if slope is None else (grad_bypass if wanted else grad_x)
        if slope is None:
            grad_bypass = grad
        if ctx.bypass_dtype is None:
            grad_bypass = None
        elif grad_bypass.dtype != ctx.bypass_dtype:
            grad_bypass = grad_bypass.to(ctx.bypass_dtype)
        d_weight, d_bias, d_in, d_slope, d_out = parameters.unbind(0)
        return (
            grad_x,
            grad_bypass,
            None,
            None if weight is None else d_weight,
            None if bias is None else d_bias,
            None if slope is None else d_in,
            None if slope is None else d_slope,
            None if slope is None else d_out,
            None,
            None,
        )


def post(
    x: Tensor,
    bypass: Tensor | None,
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None,
    activation: tuple[Tensor, Tensor, Tensor] | None,
    dim: int,
) -> Tensor:
    """act(norm(x) + bypass) in one pass over ``x`` (two with batch statistics).

    Args:
        x: the convolution's output.
        bypass: as ``x``, or None.
        norm: BatchNorm with weight and bias, or None; its running statistics are updated in training.
        activation: bias_in, slope and bias_out of RPReLU, (C,) each, or None.
    """
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    eps = 1.0 if norm is None else norm.eps
    parts = (None,) * 3 if activation is None else activation
    if norm is None and bypass is None and not torch.is_grad_enabled():
        alone: Tensor = ops.post(x, None, None, None, None, None, *parts, eps, dim)
        return alone
    x = dense(x, dim)
    if norm is None:
        result: Tensor = _Post.apply(x, bypass, None, None, None, *parts, eps, dim)
        return result
    if norm.training or not norm.track_running_stats:
        with torch.no_grad():
            moments = ops.moments(x.detach(), dim)
            if norm.training and norm.track_running_stats:
                _track(norm, moments, x.numel() // x.shape[dim])
        trained: Tensor = _Post.apply(x, bypass, moments, weight, bias, *parts, eps, dim)
        return trained
    if bypass is not None:
        bypass = match(bypass, x)
    y: Tensor = ops.post(x, bypass, norm.running_mean, norm.running_var, weight, bias, *parts, eps, dim)
    return y


def _track(norm: nn.BatchNorm1d | nn.BatchNorm2d, moments: Tensor, count: int) -> None:
    """What ``nn.BatchNorm2d`` does to its running statistics; the variance is kept unbiased."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    factor = 0.0 if factor is None else factor
    norm.running_mean.mul_(1 - factor).add_(moments[0], alpha=factor)
    norm.running_var.mul_(1 - factor).add_(moments[1], alpha=factor * count / (count - 1))


class _BinarizeRows(torch.autograd.Function):
    """scale * sign(w), rows of w being output channels; the binarized weight itself is not kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, measure: bool, ste_scaled: bool, owned: bool) -> tuple[Tensor, Tensor]:
        y, scale = ops.weight(weight, measure)
        ctx.save_for_backward(weight, scale if ste_scaled else torch.ones_like(scale))
        ctx.owned = owned
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None, None]:
        weight, scale = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        given, grad = grad, match(grad, weight)
        out = grad if ctx.owned or grad is not given else torch.empty_like(weight)
        ops.weight_backward(grad, weight, scale, out)
        return out, None, None, None


def binarize_rows(
    weight: Tensor, *, scaled: bool, ste_scaled: bool = True, owned: bool = False
) -> tuple[Tensor, Tensor]:
    """(s_o * sign(weight), s_o as (C_out,)) for a dense weight whose first dimension is the output channel.

    Args:
        weight: float32.
        scaled: False gives s_o = 1.
        ste_scaled: whether the gradient is multiplied by s_o.
        owned: nothing else will see the result's gradient, which may be overwritten.
    """
    result: tuple[Tensor, Tensor] = _BinarizeRows.apply(weight, scaled, ste_scaled, owned)
    return result
