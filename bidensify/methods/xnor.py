"""XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks (Rastegari et al., ECCV 2016).

Weights: c = w less its mean over the input channels, per output channel and tap, clamped to [-1, 1]; w_b = s_o * sign(c) with
s_o = mean |c|. Gradient to the latent weight: g * (s_o * 1[|c| < 1] + 1 / n), n = fan-in, nothing through the centring.
Activations: sign(BatchNorm(x)), gradient 1[|u| < 1].

Around a layer the authors have the block BatchNorm, sign, convolution, activation (normalized first, a sign loses
least), and neither a BatchNorm behind the convolution nor a shortcut. So the BatchNorm is a part of the activation binarizer
here. In evaluation it is a threshold per channel, and where its weight is negative the channel is turned round: packed layers
have no norm in front. Behind a ReLU, which stays as in the paper, a sign without it would see one side only.

``act_scale="spatial"`` is the paper's map K, which the authors' code leaves out: the output is multiplied by the mean
|BatchNorm(x)| over channels, averaged over each window. It is a float for each output pixel, which packed layers do not have.

Where we differ: the authors centre and clamp the stored weights themselves at each step, we what is computed with; they scale
the gradient by n * (1 - 1 / C_in), which Adam takes out again. One input channel per group is not centred: nothing would be
left of it. BatchNorm's eps is torch's 1e-5, theirs 1e-4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidensify.config import BidensifyConfig
from bidensify.exact.fold import batch_norm
from bidensify.methods.registry import LayerParts, LayerSpec, register_method
from bidensify.nn import AffineSign, BatchNormLast, WeightBinarizer, sign, straight_through, threshold_sign
from bidensify.nn.used_weight import UsedWeight


class NormalizedSign(AffineSign):
    """sign(BatchNorm(x)); with ``spatial`` the layer's output times the map K."""

    work = 2
    packable = True

    def __init__(self, spec: LayerSpec, act_scale: str) -> None:
        super().__init__(spec.in_channels, spec.dim)
        self.norm = nn.BatchNorm2d(spec.in_channels) if spec.dim == 1 else BatchNormLast(spec.in_channels)
        self.act_scale = act_scale
        # A transposed convolution's output is reached by one in each stride's step of the taps.
        self.taps = spec.fan_in / (spec.stride[0] * spec.stride[1] if spec.transposed else 1)
        if act_scale == "spatial":
            self.packable = False
            self.unpackable_reason = (
                'act_scale="spatial" multiplies each output pixel by a float that is computed from the input, which packed '
                'layers do not; train with act_scale="none" to pack'
            )

    @property
    def moving(self) -> bool:
        return self.norm.training

    def affine(self) -> tuple[Tensor, Tensor]:
        said = batch_norm(self.norm)
        return said.scale, said.shift

    def surrogate(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        return threshold_sign(u, u.new_zeros(()), u.new_ones(()), ste="strict")

    def _normalized(self, x: Tensor) -> Tensor:
        """``norm(x)`` once more, without another step of its running statistics."""
        norm, x = self.norm, x.movedim(self.dim, 1)
        batch = norm.training or norm.running_mean is None
        statistics = (None, None) if batch else (norm.running_mean, norm.running_var)
        found = nn.functional.batch_norm(x, *statistics, norm.weight, norm.bias, batch, 0.0, norm.eps)
        return found.movedim(1, self.dim)

    def _map(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """K for each output channel: the layer itself, with equal weights, on |x|."""
        size = {"output_size": list(y.shape[2:])} if isinstance(layer, nn.ConvTranspose2d) else {}
        with UsedWeight(lambda weight: torch.full_like(weight, 1 / self.taps)):
            found: Tensor = layer.bare_forward(self._normalized(x.detach()).abs(), **size)  # type: ignore[operator]
        return found.detach()

    def weigh(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        if self.act_scale != "spatial" or not self.enabled:
            return y
        scale, bias = self._map(x, y, layer), getattr(layer, "bias", None)
        if bias is None:
            return y * scale
        bias = self._shaped(bias, y)
        return (y - bias) * (scale - bias.detach()) + bias


class CentredWeight(WeightBinarizer):
    """s_o * sign(c)."""

    def centred(self, weight: Tensor) -> Tensor:
        """c, detached."""
        weight = weight.detach()
        per_group = weight.reshape(self.groups, -1, *weight.shape[1:]) if self.transposed else weight
        centred = (per_group - per_group.mean(1, keepdim=True)).reshape(weight.shape)
        # Of one channel, or of equal ones, only the mean's rounding would be left.
        left = self.rows(centred).abs().amax(1) > 8 * torch.finfo(weight.dtype).eps * self.rows(weight).abs().amax(1)
        return torch.where(self.like(left, weight), centred, weight).clamp(-1, 1)

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        centred = self.centred(weight)
        return sign(centred), self.channel_scale(centred), None

    def forward(self, weight: Tensor) -> Tensor:
        centred = self.centred(weight)
        scale = self.like(self.channel_scale(centred).to(weight.dtype), weight)
        factor = scale * (centred.abs() < 1).to(weight.dtype) + 1 / self.rows(weight).shape[1]
        return straight_through(scale * sign(centred), weight * factor)


@register_method("xnor", norm="none", citation="Rastegari et al., ECCV 2016")
def xnor(spec: LayerSpec, config: BidensifyConfig) -> LayerParts:
    """A sign behind a BatchNorm on activations, centred weights."""
    return LayerParts(
        binarizer=NormalizedSign(spec, config.act_scale),
        weight_binarizer=CentredWeight(transposed=spec.transposed, groups=spec.groups),
    )
