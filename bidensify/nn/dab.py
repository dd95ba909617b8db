"""The distribution-adaptive binarizer (DAB): a threshold per channel and a scale per sample, from the sample's own statistics.

Source: BiDense (arXiv 2411.10346), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.exact.definition import BEST_STEP
from bidensify.kernels import autograd
from bidensify.kernels import training_ops as ops
from bidensify.kernels.dense import dense, supports
from bidensify.nn.contract import ActivationBinarizer, Split
from bidensify.nn.ste import threshold_levels, threshold_sign

__all__ = ["DistributionAdaptiveBinarizer", "mean_distance", "statistics_dtype", "step_of"]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision, else the dtype of ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mean_distance(shifted: Tensor, dims: tuple[int, ...]) -> Tensor:
    """mean|shifted| over ``dims``, which stay with size 1."""
    dtype = statistics_dtype(shifted)
    if not dims:
        return shifted.abs().to(dtype)
    if shifted.device.type == "cpu":
        # The norm adds one value after another there, as other runtimes do in their means, and is off by 1e-5, by which a level
        # of many equal values can turn: so a dimension at a time.
        mean = shifted.abs()
        for d in sorted(dims, reverse=True):
            mean = mean.mean(d, keepdim=True, dtype=dtype)
        return mean
    count = 1
    for d in dims:
        count *= shifted.shape[d]
    found: Tensor = torch.linalg.vector_norm(shifted, 1, dims, keepdim=True, dtype=dtype)
    return found / count


def step_of(distance: Tensor, a: Tensor) -> Tensor:
    """The step of two bit planes: 1.248 * exp(a) * distance, which with a = 0 is the best step of a Gaussian.

    (Max, Quantizing for minimum distortion, 1960: four levels 0.9957 deviations apart; its mean distance is 0.798 of them.)
    """
    return BEST_STEP * torch.exp(a.to(distance.dtype)) * distance


class DistributionAdaptiveBinarizer(ActivationBinarizer):
    """DAB: beta_c = k_c * mean(x_c) + b_c; s = x - beta; output alpha * sign(s), alpha = exp(a * (mean|s| - 1)).

    Means are per sample; mean(x_c) over space, mean|s| over channels and space (``per_tensor``) or over space alone
    (``per_channel``). The statistics take no gradient; k, b and a learn. STE: the Bi-Real polynomial.

    With two bit planes the output is step * (sign(s) + sign(s - step * sign(s)) / 2), step = 1.248 * exp(a) * mean|s|; STE: the
    identity within two steps.

    Args:
        channels: C.
        act_scale: "per_tensor" (one alpha per sample, which leaves the popcount sum), "per_channel" (as in the
            paper's code; can be trained and compared, not packed) or "none" (alpha, or the step, is 1).
        dim: 1 for (N, C, H, W), -1 for (N, tokens..., C).
        planes: bit planes, 1 or 2.

    Shape: kept. ``k`` and ``b`` are (1, C, 1, 1) for ``dim=1`` and (C,) for ``dim=-1``; ``a`` is (1,).
    """

    # The sum of the mean, the shift, the sum of distances, the comparison.
    work = 4

    def __init__(self, channels: int, act_scale: str = "per_tensor", dim: int = 1, planes: int = 1) -> None:
        super().__init__(channels, dim)
        if act_scale not in ("per_tensor", "per_channel", "none"):
            raise ConfigError(f"act_scale={act_scale!r} must be 'per_tensor', 'per_channel' or 'none'")
        if planes not in (1, 2):
            raise ConfigError(f"planes={planes!r} must be 1 or 2 bits of an activation")
        self.act_scale = act_scale
        self.planes = planes
        if planes == 2:
            # A step and a comparison more.
            self.work = 6
        shape = (1, channels, 1, 1) if dim == 1 else (channels,)
        self.k = nn.Parameter(torch.randn(shape) * 1e-3)
        self.b = nn.Parameter(torch.zeros(shape))
        self.a = nn.Parameter(torch.randn(1) * 1e-3)
        if act_scale == "none":
            self.a.requires_grad_(False)

    @property
    def packable(self) -> bool:  # type: ignore[override]
        """Whether one alpha per sample leaves the popcount sum."""
        return self.act_scale != "per_channel"

    @property
    def unpackable_reason(self) -> str:  # type: ignore[override]
        """Why ``pack`` refuses, or an empty string."""
        if self.packable:
            return ""
        return (
            'act_scale="per_channel" keeps one alpha per input channel inside the sum over channels, which a popcount '
            'cannot weigh; train with act_scale="per_tensor" (or "none") to pack'
        )

    def _mean(self, x: Tensor) -> Tensor:
        spatial = self._spatial(x)
        dtype = statistics_dtype(x)
        return x.detach().mean(spatial, keepdim=True, dtype=dtype) if spatial else x.detach().to(dtype)

    def _threshold(self, x: Tensor) -> Tensor:
        k, b = self._shaped(self.k, x), self._shaped(self.b, x)
        mean = self._mean(x)
        return (k.to(mean.dtype) * mean + b.to(mean.dtype)).to(x.dtype)

    def _scale(self, shifted: Tensor) -> Tensor:
        if self.act_scale == "none":
            return shifted.new_ones(())
        if self.act_scale == "per_tensor":
            dims: tuple[int, ...] = tuple(range(1, shifted.dim()))
        else:
            dims = self._spatial(shifted)
        distance = mean_distance(shifted, dims)
        if self.planes == 2:
            return step_of(distance, self.a).to(shifted.dtype)
        return torch.exp(self.a.to(distance.dtype) * (distance - 1)).to(shifted.dtype)

    def native(self, x: Tensor) -> bool:
        """Whether the training kernels compute this layer for ``x``."""
        return supports(x) and self.k.dtype == torch.float32 and x.dim() > 1

    @property
    def _kind(self) -> int:
        """What the kernels call the granularity and the number of planes."""
        return ops.SCALES[self.act_scale] + (ops.TWO_PLANES if self.planes == 2 else 0)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.native(x):
            return self._native_codes(dense(x, self.dim))
        with torch.no_grad():
            beta = self._threshold(x)
            alpha = self._scale(x - beta)
        return beta, -alpha, alpha

    @torch.no_grad()
    def _native_codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        statistics = ops.dab_statistics(x, self.k, self.b, self.a, self._kind, self.dim)
        n, ones = x.shape[0], [1] * (x.dim() - 2)
        per_channel = (n, self.channels, *ones) if self.dim == 1 else (n, *ones, self.channels)
        beta = statistics[1].view(per_channel).to(x.dtype)
        if self.act_scale == "per_channel":
            alpha = statistics[3].view(per_channel).to(x.dtype)
        else:
            alpha = statistics[3].flatten()[:n].view(n, 1, *ones).to(x.dtype)
        return beta, -alpha, alpha

    def stored(self) -> dict[str, Tensor] | None:
        """k, b and, with one alpha per sample, a."""
        if self.act_scale == "per_channel":
            return None
        found: dict[str, Tensor] = {"k": self.k, "b": self.b}
        return found if self.act_scale == "none" else {**found, "a": self.a}

    def split(self, x: Tensor, groups: int, owned: bool, signs: bool = True) -> Split | None:
        if not self.native(x):
            return None
        x = dense(x, self.dim)
        signs = signs or self.act_scale == "per_channel"
        y, passed, statistics = self._dab(x, groups, owned, signs)
        source, scale, codes = x.detach(), self._kind, None
        if not signs:
            alpha = statistics[3].flatten()[: x.shape[0]]
            codes = statistics[1], torch.stack([-alpha, alpha], 1)
        again = lambda: ops.dab_again(source, statistics, scale, self.dim)  # noqa: E731
        return Split(y, passed if groups else None, source, again, codes)

    def _dab(self, x: Tensor, groups: int, owned: bool = False, signs: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        return autograd.dab(x, self.k, self.b, self.a, self._kind, groups, self.dim, owned, signs)

    def binarize(self, x: Tensor) -> Tensor:
        if self.native(x):
            return self._dab(dense(x, self.dim), 0)[0]
        beta = self._threshold(x)
        alpha = self._scale(x.detach() - beta.detach())
        return threshold_sign(x, beta, alpha) if self.planes == 1 else threshold_levels(x, beta, alpha)

    def calibrate(self, x: Tensor) -> None:
        """Sets b so that each channel has +1 and -1 on what came in since calibration began, ``x`` included."""
        rest = self._shaped(self.k, x).float() * self._mean(x)
        self.b.copy_(self._even_thresholds(x, rest).reshape(self.b.shape))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act_scale={self.act_scale!r}"
