"""BiT: Robustly Binarized Multi-distilled Transformer (Liu et al., NeurIPS 2022).

Weights: w_b = m * sign(w - e), m = mean |w| and e = mean w over the whole layer; the gradient goes through as it is.
Activations, elastic binarization of u = x + b_c, b and one alpha per layer learned:
* in general alpha * sign(u); gradient 1[|u| <= alpha], to alpha g sign(u);
* where the input is never negative (behind a ReLU) alpha * round(clip(u / alpha, 0, 1)), that is 0 or alpha, a tie being 0;
  gradient 1[0 <= u <= alpha], to alpha g * 1 above alpha, g * (round(u / alpha) - u / alpha) within, 0 below.
The gradient to alpha is divided by sqrt(number of elements), as learned step sizes have it. alpha is at least 1e-5; it starts at
2 (0 and alpha: 4) times mean |u| of the first batches, which is what calibration is for (1 without it).

Around a layer the authors change nothing: LayerNorm, residual adds and biases stay, no norm is added.

Where we differ: the authors binarize what enters the two products of attention too; here attention stays in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.config import BidensifyConfig
from bidensify.methods.around import linear_alone
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import ActivationBinarizer, WeightBinarizer, sign, straight_through
from bidensify.nn.ste import just_above

_LEAST = 1e-5


class ElasticBinarizer(ActivationBinarizer):
    """-alpha and alpha, or 0 and alpha."""

    work = 2

    def __init__(self, channels: int, dim: int = 1, *, nonnegative: bool = False) -> None:
        super().__init__(channels, dim)
        self.nonnegative = nonnegative
        self.b = nn.Parameter(torch.zeros(channels))
        self.alpha = nn.Parameter(torch.ones(1))
        self._batches = 0

    def _values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Threshold (C,), low and high."""
        b, alpha = self.b.detach().to(dtype), self.alpha.detach().to(dtype).clamp(min=_LEAST)
        if not self.nonnegative:
            return -b, -alpha, alpha
        return just_above(alpha / 2 - b), torch.zeros_like(alpha), alpha

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        threshold, low, high = self._values(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return self._shaped(threshold, x).to(x.dtype), low.to(x.dtype), high.to(x.dtype)

    def stored(self) -> dict[str, Tensor] | None:
        threshold, low, high = self._values(torch.float32)
        return {"b": threshold, "levels": torch.cat([low, high])}

    def binarize(self, x: Tensor) -> Tensor:
        threshold, low, high = self.codes(x)
        above = x.detach() >= threshold
        u = x + self._shaped(self.b, x).to(x.dtype)
        if self.nonnegative:
            q = u.detach() / high
            slope = torch.where(
                q > 1, torch.ones_like(q), torch.where(q < 0, torch.zeros_like(q), above.to(q.dtype) - q)
            )
        else:
            slope = torch.where(above, 1.0, -1.0).to(u.dtype)
        through = u.clamp(low, high) + slope * (self.alpha.to(x.dtype) / x.numel() ** 0.5)
        return straight_through(torch.where(above, high, low), through)

    def begin_calibration(self) -> None:
        super().begin_calibration()
        self._batches = 0

    def calibrate(self, x: Tensor) -> None:
        """Sets alpha to 2 (0 and alpha: 4) times mean |x + b|, over all batches since calibration began."""
        self._batches += 1
        size = (x + self._shaped(self.b, x).to(x.dtype)).abs().mean(dtype=torch.float32) * (
            4 if self.nonnegative else 2
        )
        self.alpha.add_((size - self.alpha) / self._batches)


class LayerCentredWeight(WeightBinarizer):
    """m * sign(w - e), both of the whole layer."""

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = weight.detach()
        away = weight - weight.mean() if weight.numel() > 1 else weight
        return sign(away), weight.abs().mean().expand(len(self.rows(weight))), None


@register_method("bit", norm="none", keeps=linear_alone, citation="Liu et al., NeurIPS 2022")
def bit(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """Learned values on activations, one scale per layer on centred weights."""
    return LayerParts(
        binarizer=ElasticBinarizer(spec.in_channels, spec.dim, nonnegative=spec.nonnegative),
        weight_binarizer=LayerCentredWeight(
            transposed=spec.transposed, groups=spec.groups, ste="identity", ste_scaled=False
        ),
    )
