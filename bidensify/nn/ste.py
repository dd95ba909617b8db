"""Sign functions with straight-through estimators (STE), for activations and for weights.

Everywhere sign(0) = +1 (and sign(-0.0) = +1): a third state cannot be packed into one bit.

An estimator is what stands for the derivative of sign(u) in the backward pass, u the input less its threshold:

=============  ==========================  ==========================================================================
clipped        1[abs(u) <= 1]              Binarized Neural Networks (Hubara et al., NeurIPS 2016, eq. 4)
strict         1[abs(u) < 1]               XNOR-Net's code (Rastegari et al., ECCV 2016)
polynomial     2 max(0, 1 - abs(u))        Bi-Real Net (Liu et al., ECCV 2018, eq. 6)
tanh           k t (1 - tanh(t u)^2)       IR-Net (Qin et al., CVPR 2020, eq. 8): t and k follow the training's progress
identity       1                           DoReFa-Net (Zhou et al., 2016)
=============  ==========================  ==========================================================================

With two bit planes (``threshold_levels``) it is the identity within two steps, 1[abs(u) <= 2 step].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bidensify._util.names import near
from bidensify.errors import ConfigError

__all__ = [
    "Estimator",
    "binarize_weight",
    "clipped_sign",
    "estimator",
    "just_above",
    "polynomial_sign",
    "sign",
    "straight_through",
    "threshold_levels",
    "threshold_sign",
]

_WINDOWS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "clipped": lambda u, k, t: (u.abs() <= 1).to(u.dtype),
    "strict": lambda u, k, t: (u.abs() < 1).to(u.dtype),
    # d/du of 2u + u^2 on [-1, 0) and 2u - u^2 on [0, 1), and 0 outside.
    "polynomial": lambda u, k, t: u.abs().neg_().add_(1).clamp_(min=0).mul_(2),
    "tanh": lambda u, k, t: (u * t).tanh_().square_().neg_().add_(1).mul_(k * t),
    "identity": lambda u, k, t: torch.ones_like(u),
}


@dataclass
class Estimator:
    """An estimator by name; ``k`` and ``t`` are of "tanh" alone."""

    name: str
    k: float = 1.0
    t: float = 1.0

    def window(self, u: Tensor) -> Tensor:
        """What stands for the derivative of sign at ``u``. Shape: any, kept."""
        return _WINDOWS[self.name](u, self.k, self.t)

    def set_progress(self, fraction: float) -> None:
        """Of "tanh": t = 10^(-3 + 4 fraction), k = max(1 / t, 1): from the identity to the sign's own derivative."""
        if self.name == "tanh":
            self.t = 10.0 ** (-3 + 4 * fraction)
            self.k = max(1 / self.t, 1.0)


def estimator(ste: str | Estimator) -> Estimator:
    """An estimator of a name, at the beginning of training; one that is given is copied.

    Raises:
        ConfigError: there is none of this name.
    """
    if isinstance(ste, Estimator):
        return replace(ste)
    if ste not in _WINDOWS:
        raise ConfigError(f"ste={ste!r} is no estimator{near(ste, _WINDOWS)}")
    made = Estimator(ste)
    made.set_progress(0.0)
    return made


def just_above(threshold: Tensor) -> Tensor:
    """The next larger number, so that x >= it says x > ``threshold``. Shape: any, kept.

    In a graph for other runtimes it is the threshold itself, which differs on that one value: they have no such operator.
    """
    if torch.compiler.is_compiling():
        return threshold
    return torch.nextafter(threshold, torch.full_like(threshold, torch.inf))


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
    def forward(ctx: Any, x: Tensor, beta: Tensor, alpha: Tensor, name: str, k: float, t: float) -> Tensor:
        ctx.save_for_backward(x, beta, alpha)
        ctx.ste = name, k, t
        return torch.copysign(alpha, _above(x, beta))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, beta, alpha = ctx.saved_tensors
        name, k, t = ctx.ste
        shifted = _above(x, beta)
        grad_alpha = None
        if ctx.needs_input_grad[2]:
            signs = torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), shifted)
            grad_alpha = signs.mul_(grad).sum_to_size(alpha.shape)
        grad_x = _WINDOWS[name](shifted, k, t).mul_(grad).mul_(alpha)
        grad_beta = None
        if ctx.needs_input_grad[1]:
            # sum_to_size gives grad_x itself where the shapes are equal: not in place.
            grad_beta = grad_x.sum_to_size(beta.shape).neg()
        return (grad_x if ctx.needs_input_grad[0] else None), grad_beta, grad_alpha, None, None, None


def threshold_sign(x: Tensor, beta: Tensor, alpha: Tensor, *, ste: str | Estimator = "polynomial") -> Tensor:
    """alpha * sign(x - beta), differentiable in all three.

    Forward: ``alpha`` where x >= beta, ``-alpha`` elsewhere. Backward: to x through the estimator at x - beta, times alpha; to
    beta with the opposite sign, summed over what it was broadcast to; to alpha exactly.

    Args:
        x: any shape.
        beta: thresholds, broadcastable to ``x``, same dtype.
        alpha: positive scale, broadcastable to ``x``, same dtype.
        ste: the estimator.
    """
    ste = ste if isinstance(ste, Estimator) else estimator(ste)
    result: Tensor = _ThresholdSign.apply(x, beta, alpha, ste.name, ste.k, ste.t)
    return result


class _ThresholdLevels(torch.autograd.Function):
    """step * (s1 + s2 / 2); keeps only x, beta and the step for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(x, beta, step)
        return _levels(x, beta, step) * step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, beta, step = ctx.saved_tensors
        shifted = x - beta
        window = (shifted.abs() <= 2 * step).to(x.dtype)
        grad_x = window * grad
        grad_beta = grad_x.sum_to_size(beta.shape).neg() if ctx.needs_input_grad[1] else None
        grad_step = None
        if ctx.needs_input_grad[2]:
            # Within the window the step's own change moves the level, and what is left of x the other way (LSQ).
            tiny = torch.finfo(step.dtype).tiny
            left = _levels(x, beta, step) - window * shifted / step.clamp(min=tiny)
            grad_step = left.mul_(grad).sum_to_size(step.shape)
        return (grad_x if ctx.needs_input_grad[0] else None), grad_beta, grad_step


def _levels(x: Tensor, beta: Tensor, step: Tensor) -> Tensor:
    """s1 + s2 / 2, among -1.5, -0.5, 0.5 and 1.5."""
    first = x >= beta
    second = x >= torch.where(first, beta + step, beta - step)
    return first.to(x.dtype) * 2 + second.to(x.dtype) - 1.5


def threshold_levels(x: Tensor, beta: Tensor, step: Tensor) -> Tensor:
    """step * (s1 + s2 / 2) with s1 = sign(x - beta) and s2 = sign(x - beta - step * s1), differentiable in all three.

    That is the nearest of beta's surroundings -1.5, -0.5, 0.5 and 1.5 steps, without beta. Backward: to x the identity within
    two steps of beta; to beta with the opposite sign, summed over what it was broadcast to; to the step as learned step sizes
    have it (Esser et al., ICLR 2020, eq. 3).

    Args:
        x: any shape.
        beta: thresholds, broadcastable to ``x``, same dtype.
        step: not negative, broadcastable to ``x``, same dtype.
    """
    result: Tensor = _ThresholdLevels.apply(x, beta, step)
    return result


def polynomial_sign(x: Tensor) -> Tensor:
    """sign(x) with the Bi-Real estimator: gradient 2 * max(0, 1 - |x|). Shape: any, kept."""
    return threshold_sign(x, x.new_zeros(()), x.new_ones(()), ste="polynomial")


def clipped_sign(x: Tensor) -> Tensor:
    """sign(x) with the clipped identity: gradient 1[|x| <= 1]. Shape: any, kept."""
    return threshold_sign(x, x.new_zeros(()), x.new_ones(()), ste="clipped")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, through: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(value: Tensor, through: Tensor) -> Tensor:
    """``value`` to the bit, with the gradient of ``through``: any surrogate is then plain torch.

    (The usual ``through + (value - through).detach()`` rounds, and two values become many.)

    Args:
        value: what comes out; takes no gradient.
        through: of the same shape and dtype.
    """
    result: Tensor = _StraightThrough.apply(value.detach(), through)
    return result


class _BinarizeWeight(torch.autograd.Function):
    """scale * sign(w) (+ offset), keeping the latent weight itself and the scale only."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, signs: Tensor | None, scale: Tensor, offset: Tensor | None, name: str, k: float, t: float,
        scaled: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight, scale)
        ctx.ste, ctx.scaled = (name, k, t), scaled
        binary = torch.copysign(scale, weight + 0.0) if signs is None else signs * scale
        return binary if offset is None else binary + offset

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        name, k, t = ctx.ste
        window = _WINDOWS[name](weight, k, t)
        grad = grad * scale if ctx.scaled else grad
        # What the window leaves out is 0, whatever the gradient is there.
        return torch.where(window == 0, window, window * grad), *(None,) * 7


def binarize_weight(
    weight: Tensor,
    scale: Tensor,
    *,
    signs: Tensor | None = None,
    offset: Tensor | None = None,
    ste: str | Estimator = "clipped",
    ste_scaled: bool = True,
) -> Tensor:
    """scale * sign(weight) + offset. Scale and offset take no gradient; the weight's is grad * window(weight) (* scale).

    Args:
        weight: latent weight, any shape.
        scale: non-negative, broadcastable to ``weight``.
        signs: -1 and +1 in place of the weight's own signs.
        offset: broadcastable to ``weight``, or None for 0.
        ste: the estimator.
        ste_scaled: whether the gradient is multiplied by the scale.
    """
    ste = ste if isinstance(ste, Estimator) else estimator(ste)
    offset = None if offset is None else offset.detach()
    result: Tensor = _BinarizeWeight.apply(weight, signs, scale.detach(), offset, ste.name, ste.k, ste.t, ste_scaled)
    return result
