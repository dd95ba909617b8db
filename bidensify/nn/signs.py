"""Sign functions of the input itself: the sign alone, behind a learned threshold, behind a scale and a shift per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.nn.contract import ActivationBinarizer
from bidensify.nn.dab import mean_distance, step_of
from bidensify.nn.ste import Estimator, estimator, just_above, straight_through, threshold_levels, threshold_sign

__all__ = ["AffineSign", "ShiftedSign", "SignBinarizer", "crossing"]


class SignBinarizer(ActivationBinarizer):
    """sign(x) with sign(0) = +1: Binarized Neural Networks (Hubara et al., NeurIPS 2016) with the "clipped" estimator.

    With two bit planes it is step * (sign(x) + sign(x - step * sign(x)) / 2): a second bit needs to know where it lies, and takes
    the sample's mean for it, step = 1.248 * exp(a) * mean|x| with a learned ``a``, 0 at first.

    Args:
        channels: C.
        dim: 1 or -1.
        ste: the estimator of one plane, see ``bidensify.nn.ste``.
        planes: bit planes, 1 or 2.
    """

    def __init__(self, channels: int, dim: int = 1, *, ste: str | Estimator = "clipped", planes: int = 1) -> None:
        super().__init__(channels, dim)
        self.ste = estimator(ste)
        self.planes = planes
        if planes == 2:
            self.a = nn.Parameter(torch.zeros(()))
            # The shift, the sum of distances, the step, two comparisons.
            self.work = 6

    def _threshold(self, x: Tensor) -> Tensor:
        return x.new_zeros(())

    def _step(self, x: Tensor, threshold: Tensor) -> Tensor:
        away = (x - threshold).detach()
        return step_of(mean_distance(away, tuple(range(1, x.dim()))), self.a).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        threshold = self._threshold(x).detach()
        half = x.new_ones(()) if self.planes == 1 else self._step(x, threshold).detach()
        return threshold, -half, half

    def stored(self) -> dict[str, Tensor] | None:
        """With one plane nothing: the threshold is 0, the values are -1 and +1."""
        return {} if self.planes == 1 else {"a": self.a}

    def binarize(self, x: Tensor) -> Tensor:
        threshold = self._threshold(x)
        if self.planes == 2:
            return threshold_levels(x, threshold, self._step(x, threshold))
        return threshold_sign(x, threshold, x.new_ones(()), ste=self.ste)

    def set_progress(self, fraction: float) -> None:
        self.ste.set_progress(fraction)


class ShiftedSign(SignBinarizer):
    """sign(x + b_c), b learned per channel: ReActNet's RSign (Liu et al., ECCV 2020) with the "polynomial" estimator.

    ``b`` starts at 0; calibration sets it so that each channel has both signs.
    """

    def __init__(self, channels: int, dim: int = 1, *, ste: str | Estimator = "polynomial", planes: int = 1) -> None:
        super().__init__(channels, dim, ste=ste, planes=planes)
        self.b = nn.Parameter(torch.zeros(channels))

    def _threshold(self, x: Tensor) -> Tensor:
        return -self._shaped(self.b, x).to(x.dtype)

    def stored(self) -> dict[str, Tensor] | None:
        return {**(super().stored() or {}), "b": -self.b}

    def calibrate(self, x: Tensor) -> None:
        self.b.copy_(-self._even_thresholds(x))


def crossing(k: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Where k x + b changes its sign, as a comparison: flip * (x >= threshold ? 1 : -1) is +1 exactly where k x + b >= 0.

    Args:
        k, b: (C,).
        dtype: of x and of the result.

    Returns:
        (C,) each: threshold, and flip: -1 where k < 0. Where k is 0 every x is above the threshold, and flip is b's sign.
    """
    # Other runtimes that a graph is written for choose among float32 numbers alone.
    narrow = dtype != torch.float64 and (k.device.type == "mps" or torch.compiler.is_compiling())
    wide = torch.float32 if narrow else torch.float64
    k, b = k.detach().to(wide), b.detach().to(wide)
    largest = torch.finfo(dtype).max
    # Where no x changes the sign, b's sign is that of every x.
    constant = (k == 0) | ((b / k).abs() > largest)
    threshold = torch.where(constant, -largest, -b / k).to(dtype)
    # The first x of the side that the comparison is for: rounding may have left the threshold on the other, and with a negative
    # k an x where k x + b is 0 belongs to the other.
    side = k * threshold.to(wide) + b
    behind = constant | ((k < 0) & (side < 0)) | ((k >= 0) & (side >= 0))
    above = just_above(threshold).clamp(max=largest)
    turned = (constant & (b < 0)) | (~constant & (k < 0))
    flip = torch.where(turned, -1.0, 1.0).to(dtype)
    return torch.where(behind, threshold, above), flip


class AffineSign(ActivationBinarizer):
    """sign(k_c x + b_c) as a threshold -b / k per channel, and a flip where k is negative: base of those that say k and b.

    A subclass gives ``affine`` and ``surrogate``.
    """

    def affine(self) -> tuple[Tensor, Tensor]:
        """k and b, (C,) each."""
        raise NotImplementedError

    def surrogate(self, x: Tensor) -> Tensor:
        """What the gradient goes through, in the shape of ``x``; its value does not matter unless ``moving``."""
        raise NotImplementedError

    @property
    def moving(self) -> bool:
        """Whether k and b are of this very input: then ``surrogate`` gives the binarized values too."""
        return False

    def _crossing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        threshold, flip = crossing(*self.affine(), torch.float64 if x.dtype == torch.float64 else torch.float32)
        return self._shaped(threshold, x).to(x.dtype), self._shaped(flip, x).to(x.dtype)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = x.new_ones(())
        return self._crossing(x)[0], -one, one

    def stored(self) -> dict[str, Tensor] | None:
        return {"b": crossing(*self.affine())[0]}

    def flips(self) -> Tensor | None:
        return crossing(*self.affine())[1]

    def binarize(self, x: Tensor) -> Tensor:
        through = self.surrogate(x)
        if self.moving:
            return through
        threshold, flip = self._crossing(x)
        return straight_through(torch.where(x.detach() >= threshold, flip, -flip), through)
