"""Weight binarizers: what a binary layer computes with in place of its latent weight; the base of all is the scaled sign.

Where an output channel is fed by one weight, or by equal ones, nothing is left of it less its mean: there no binarizer here
centres (``WeightBinarizer.moments``), so that a depthwise 1x1 convolution keeps its weights' signs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.kernels import autograd, evaluation_ops
from bidensify.kernels.dense import geometry, supports
from bidensify.nn.ste import Estimator, binarize_weight, estimator, sign, straight_through, threshold_sign

__all__ = ["LearnedScaleWeight", "TransformedWeight", "WeightBinarizer"]


class WeightBinarizer(nn.Module):
    """w_b = s_o * sign(w) with s_o = mean |w| over all the weights that feed output channel o.

    s_o takes no gradient; STE: identity where |w| <= 1, else 0, times s_o. BiDense (arXiv 2411.10346), eq. 2, after XNOR-Net.

    Also the base of other weight binarizers. A subclass defines ``codes``, what the binarized weight is (w_b = scale_o * signs +
    offset_o), or ``forward``, the differentiable binarization; whichever it defines, the other follows: ``forward`` is codes
    behind this class's estimator, ``codes`` are read off what ``forward`` gives.

    Args:
        transposed: the weight is (C_in, C_out / groups, kH, kW).
        groups: the layer's groups (needed to find the output channel in a transposed weight).
        scaled: False gives s_o = 1 (BNN).
        ste: the estimator behind the sign, see ``bidensify.nn.ste``.
        ste_scaled: whether the gradient is multiplied by s_o, as the chain rule has it, or not, as the authors' code has it.

    Attributes:
        packable, unpackable_reason: whether ``pack`` takes it, and why not.
    """

    packable: bool = True
    unpackable_reason: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        if "forward" in own and "codes" not in own:
            cls.codes = _codes_of_forward  # type: ignore[method-assign]
        elif "codes" in own and "forward" not in own:
            cls.forward = _forward_of_codes  # type: ignore[method-assign]

    def __init__(
        self,
        *,
        transposed: bool = False,
        groups: int = 1,
        scaled: bool = True,
        ste: str | Estimator = "clipped",
        ste_scaled: bool = True,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.groups = groups
        self.scaled = scaled
        self.ste = estimator(ste)
        self.ste_scaled = ste_scaled

    def rows(self, weight: Tensor) -> Tensor:
        """(C_out, fan-in): the weights that feed each output channel."""
        if not self.transposed:
            return weight.flatten(1)
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def like(self, values: Tensor, weight: Tensor) -> Tensor:
        """(C_out,) values, broadcastable to ``weight``."""
        if values.numel() == 1:
            return values.reshape(())
        if not self.transposed:
            return values.reshape(-1, *([1] * (weight.dim() - 1)))
        per_group = values.reshape(self.groups, 1, -1).expand(-1, weight.shape[0] // self.groups, -1)
        return per_group.reshape(weight.shape[0], -1, *([1] * (weight.dim() - 2)))

    def channel_scale(self, weight: Tensor) -> Tensor:
        """s_o as (C_out,), float32 (of a float64 weight float64), its mean taken in float64; detached."""
        rows = self.rows(weight.detach())
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if not self.scaled:
            return torch.ones(len(rows), dtype=dtype, device=rows.device)
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        total: Tensor = torch.linalg.vector_norm(rows, 1, 1, dtype=wide)
        return (total / rows.shape[1]).to(dtype)

    def moments(self, weight: Tensor, correction: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the weights that feed each output channel, differentiable, and where there are any.

        Args:
            weight: as the layer holds it.
            correction: 1 divides the sum of squares by one less than the number of weights.

        Returns:
            (C_out,) each: mean, deviation, and whether the weights differ; where they do not, mean 0 and deviation 1.
        """
        rows = self.rows(weight)
        mean = rows.mean(1)
        away = rows - mean[:, None]
        # Equal weights differ from their mean by the mean's rounding.
        differ = away.detach().abs().amax(1) > 8 * torch.finfo(rows.dtype).eps * rows.detach().abs().amax(1)
        # The root of 0 has no gradient, also where it is not taken.
        square = torch.where(differ, away.square().sum(1) / max(rows.shape[1] - correction, 1), torch.ones_like(mean))
        return torch.where(differ, mean, torch.zeros_like(mean)), square.sqrt(), differ

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(signs of -1 and +1 in the shape of ``weight``, scale (C_out,), offset (C_out,) or None for 0); detached."""
        if self.native(weight):
            signs, scale = evaluation_ops.signs(weight.detach())
            return signs, scale if self.scaled else torch.ones_like(scale), None
        return sign(weight), self.channel_scale(weight), None

    def native(self, weight: Tensor) -> bool:
        """Whether the training kernels binarize ``weight``: output channels outermost in memory, float32, clipped STE."""
        kind = type(self)
        return (
            kind.forward is WeightBinarizer.forward
            and kind.channel_scale is WeightBinarizer.channel_scale
            and not self.transposed
            and weight.dtype == torch.float32
            and self.ste.name == "clipped"
            and supports(weight)
            and geometry(weight, 1) is not None
        )

    def forward(self, weight: Tensor) -> Tensor:
        """The differentiable binarization of a latent weight, in its shape and dtype."""
        if self.native(weight):
            return autograd.binarize_rows(weight, scaled=self.scaled, ste_scaled=self.ste_scaled)[0]
        scale = self.like(self.channel_scale(weight).to(weight.dtype), weight)
        return binarize_weight(weight, scale, ste=self.ste, ste_scaled=self.ste_scaled)

    def set_progress(self, fraction: float) -> None:
        """Called as training goes on, with 0 at its first step and 1 at its end."""
        self.ste.set_progress(fraction)

    def extra_repr(self) -> str:
        said = [] if self.scaled else ["scaled=False"]
        said += [] if self.ste.name == "clipped" else [f"ste={self.ste.name!r}"]
        return ", ".join(said + ([] if self.ste_scaled else ["ste_scaled=False"]))


class TransformedWeight(WeightBinarizer):
    """w_b = scale_o * sign(u) + offset_o of a u that a subclass makes of the weight.

    The gradient goes through the estimator at u (times scale_o, unless ``ste_scaled`` is False), and on through whatever
    u, scale and offset are made of.
    """

    def transform(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(u in the shape of ``weight``, scale (C_out,), offset (C_out,) or None), differentiable where the method is."""
        raise NotImplementedError

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        with torch.no_grad():
            u, scale, offset = self.transform(weight.detach())
        return sign(u), scale.detach(), None if offset is None else offset.detach()

    def forward(self, weight: Tensor) -> Tensor:
        u, scale, offset = self.transform(weight)
        signs = threshold_sign(u, u.new_zeros(()), u.new_ones(()), ste=self.ste)
        factor = self.like(scale, weight).to(u.dtype)
        binary = factor * signs if self.ste_scaled else straight_through(factor * signs, signs)
        return (binary if offset is None else binary + self.like(offset, weight)).to(weight.dtype)


class LearnedScaleWeight(TransformedWeight):
    """Base of weight binarizers whose scale ``alpha`` (C_out,) is learned.

    Args:
        channels: C_out.
        weight: alpha starts at its mean |w| per output channel; at 1 without one.
        options: see ``WeightBinarizer``.
    """

    def __init__(self, channels: int, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(**options)
        start = torch.ones(channels) if weight is None else self.channel_scale(weight).to(weight.dtype)
        self.alpha = nn.Parameter(start)


def _codes_of_forward(self: WeightBinarizer, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The two values of each output channel that ``forward`` gives.

    Raises:
        ConfigError: it gives more than two.
    """
    with torch.no_grad():
        binary = self(weight.detach())
        rows = self.rows(binary).double()
        high, low = rows.amax(1), rows.amin(1)
        # One value alone: as many as are there, and their sign.
        scale = torch.where(high > low, (high - low) / 2, high.abs())
        offset = torch.where(high > low, (high + low) / 2, torch.zeros_like(high))
        wide = binary.double()
        signs = sign(wide - self.like(offset, weight))
        apart = (self.like(scale, weight) * signs + self.like(offset, weight) - wide).abs()
        if bool((apart > 1e-5 * self.like(scale, weight)).any()):
            raise ConfigError(
                f"{type(self).__name__} gives more than two values for an output channel, which no bit says; define codes(w) -> "
                "(signs, scale, offset) and a forward of two values per channel"
            )
        return signs.to(weight.dtype), scale.float(), offset.float() if bool((offset != 0).any()) else None


def _forward_of_codes(self: WeightBinarizer, weight: Tensor) -> Tensor:
    """``codes`` behind the estimator."""
    signs, scale, offset = self.codes(weight.detach())
    scale = self.like(scale.detach().to(weight.dtype), weight)
    offset = None if offset is None else self.like(offset.detach().to(weight.dtype), weight)
    signs = signs.detach().to(weight.dtype)
    return binarize_weight(weight, scale, signs=signs, offset=offset, ste=self.ste, ste_scaled=self.ste_scaled)
