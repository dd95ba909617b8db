"""The sign alone: Binarized Neural Networks (Hubara et al., NeurIPS 2016)."""

from __future__ import annotations

from torch import Tensor

from bidensify.nn.contract import ActivationBinarizer
from bidensify.nn.ste import Estimator, estimator, threshold_sign

__all__ = ["SignBinarizer"]


class SignBinarizer(ActivationBinarizer):
    """sign(x) with sign(0) = +1.

    Args:
        channels: C.
        dim: 1 or -1.
        ste: the estimator, see ``bidensify.nn.ste``.
    """

    def __init__(self, channels: int, dim: int = 1, *, ste: str | Estimator = "clipped") -> None:
        super().__init__(channels, dim)
        self.ste = estimator(ste)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = x.new_ones(())
        return x.new_zeros(()), -one, one

    def stored(self) -> dict[str, Tensor] | None:
        """Nothing: the threshold is 0, the values are -1 and +1."""
        return {}

    def binarize(self, x: Tensor) -> Tensor:
        return threshold_sign(x, x.new_zeros(()), x.new_ones(()), ste=self.ste)

    def set_progress(self, fraction: float) -> None:
        self.ste.set_progress(fraction)
