"""Methods of parts that the contract suite makes itself: one for each thing that a part may say of itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.methods import LayerParts, LayerSpec
from bidensify.nn import (
    ActivationBinarizer,
    AffineSign,
    Pointwise,
    SignBinarizer,
    WeightBinarizer,
    straight_through,
    threshold_levels,
    threshold_sign,
)


class CentredWeight(WeightBinarizer):
    """A forward of its own, and no codes: they are read off it."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = self.rows(weight)
        # Of a single weight nothing would be left.
        return super().forward(weight - self.like(rows.mean(1), weight) if rows.shape[1] > 1 else weight)


class OffsetWeight(WeightBinarizer):
    """Codes of its own with an offset (AdaBin), and no forward."""

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = self.rows(weight.detach()).double()
        offset = rows.mean(1) if rows.shape[1] > 1 else torch.zeros_like(rows[:, 0])
        scale = (rows - offset[:, None]).square().mean(1).sqrt()
        away = weight.detach().double() - self.like(offset, weight)
        return torch.where(away >= 0, 1.0, -1.0).to(weight), scale.float(), offset.float()


class ChannelThreshold(ActivationBinarizer):
    """sign(x - b_c): a threshold that is learned per channel, which packed layers store."""

    def __init__(self, channels: int, dim: int = 1, planes: int = 1) -> None:
        super().__init__(channels, dim)
        self.planes = planes
        self.threshold = nn.Parameter(torch.linspace(-0.3, 0.3, channels))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = x.new_ones(())
        return self._shaped(self.threshold, x).to(x.dtype), -one, one

    def stored(self) -> dict[str, Tensor] | None:
        return {"b": self.threshold}


class Turned(AffineSign):
    """sign(k_c x + b_c) with every third k negative and one 0: packed layers turn the weight bits of those channels."""

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__(channels, dim)
        self.k = nn.Parameter(torch.where(torch.arange(channels) % 3 == 1, -0.7, 1.3))
        self.b = nn.Parameter(torch.linspace(-0.5, 0.5, channels))

    def affine(self) -> tuple[Tensor, Tensor]:
        # The suite adds noise: some of the negative ones become 0.
        return torch.where(self.k.abs() < 0.65, torch.zeros_like(self.k), self.k), self.b

    def surrogate(self, x: Tensor) -> Tensor:
        k, b = (self._shaped(parameter, x).to(x.dtype) for parameter in (self.k, self.b))
        return (k * x + b).clamp(-1, 1)


class TurnedTwice(Turned):
    """Turned channels of two bit planes."""

    planes = 2
    codes = Turned.codes
    stored = Turned.stored
    flips = Turned.flips

    def binarize(self, x: Tensor) -> Tensor:
        threshold, flip = self._crossing(x)
        values = threshold_levels(x.detach(), threshold, x.new_ones(())) * flip
        return straight_through(values, self.surrogate(x))


class SampleThreshold(ActivationBinarizer):
    """Thresholds and lopsided values from the sample: of no form that packed layers store, so the part is kept and asked."""

    def __init__(self, channels: int, dim: int = 1, planes: int = 1) -> None:
        super().__init__(channels, dim)
        self.planes = planes
        self.factor = nn.Parameter(torch.tensor(0.5))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.detach().double()
        largest = wide.abs().amax(self._spatial(x), keepdim=True).to(x.dtype)
        spread = wide.abs().amax(tuple(range(1, x.dim())), keepdim=True).to(x.dtype)
        return self.factor.to(x.dtype) * largest / 4, -spread / 4, spread


class ZeroOne(ActivationBinarizer):
    """{0, 2}, constant values that packed layers store (DoReFa's are 0 and 1)."""

    def __init__(self, channels: int, dim: int = 1, planes: int = 1) -> None:
        super().__init__(channels, dim)
        self.planes = planes

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.new_full((), 0.25), x.new_zeros(()), x.new_full((), 2.0)

    def stored(self) -> dict[str, Tensor] | None:
        return {"b": torch.full((self.channels,), 0.25), "levels": torch.tensor([0.0, 2.0])}

    def binarize(self, x: Tensor) -> Tensor:
        if self.planes == 2:
            return threshold_levels(x, x.new_full((), 0.25), x.new_ones(())) + 1
        return threshold_sign(x, x.new_full((), 0.25), x.new_ones(()), ste="clipped") + 1


class Maxout(nn.Module):
    """Two learned slopes per channel, of any sign (AdaBin's)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.rise = nn.Parameter(torch.linspace(-0.5, 1.5, channels))
        self.slope = nn.Parameter(torch.linspace(0.5, -0.5, channels))

    def folded(self) -> Pointwise:
        return Pointwise(rise=self.rise, slope=self.slope)

    def forward(self, x: Tensor) -> Tensor:
        rise, slope = (
            p if self.dim == -1 else p.view(-1, *([1] * (x.dim() - 2))) for p in (self.rise.to(x), self.slope.to(x))
        )
        return torch.where(x > 0, x * rise, x * slope)


def weights(spec: LayerSpec, cls: type[WeightBinarizer] = WeightBinarizer, **options: object) -> WeightBinarizer:
    return cls(transposed=spec.transposed, groups=spec.groups, **options)  # type: ignore[arg-type]


def register() -> list[str]:
    """Registers them all; returns their names."""

    @bd.register_method("own-centred", bypass="all")
    def centred(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        return LayerParts(SignBinarizer(spec.in_channels, spec.dim), weights(spec, CentredWeight))

    @bd.register_method("own-offset", bypass="same", activation=Maxout, act_bits=(1, 2))
    def offset(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        binarizer = SignBinarizer(spec.in_channels, spec.dim, planes=config.act_bits)
        return LayerParts(binarizer, weights(spec, OffsetWeight, ste="tanh"))

    @bd.register_method("own-offset-lopsided", bypass="all", activation_first=True, activation=Maxout, act_bits=(1, 2))
    def lopsided(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        binarizer = ZeroOne(spec.in_channels, spec.dim, config.act_bits)
        return LayerParts(binarizer, weights(spec, OffsetWeight, ste="identity"))

    @bd.register_method("own-thresholds", activation=lambda channels, dim: nn.Hardtanh(-0.5, 0.75), act_bits=(1, 2))
    def thresholds(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        binarizer = ChannelThreshold(spec.in_channels, spec.dim, config.act_bits)
        return LayerParts(binarizer, weights(spec, ste="strict", ste_scaled=False))

    @bd.register_method(
        "own-samples", bypass="all", norm="none", activation=lambda channels, dim: nn.GELU(), act_bits=(1, 2)
    )
    def samples(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        return LayerParts(SampleThreshold(spec.in_channels, spec.dim, config.act_bits), weights(spec, OffsetWeight))

    @bd.register_method("own-turned", bypass="all", activation=Maxout, act_bits=(1, 2))
    def turned(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        binarizer = (Turned if config.act_bits == 1 else TurnedTwice)(spec.in_channels, spec.dim)
        return LayerParts(binarizer, weights(spec))

    @bd.register_method("own-scheduled", bypass="all", norm="none", activation_first=True)
    def scheduled(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        return LayerParts(SignBinarizer(spec.in_channels, spec.dim, ste="tanh"), weights(spec, ste="tanh"))

    return [name for name in bd.available_methods() if name.startswith("own-")]
