"""What the levers of ``lever_list.py`` are made of: other starts, what follows each step, mixed samples, other parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import bidensify as bd
from bidensify.methods import LayerParts, LayerSpec, get_method
from bidensify.methods.around import rprelu
from bidensify.nn import Bypass, DistributionAdaptiveBinarizer, RPReLU, binary_layers, sign
from bidensify.rewrite.apply.norms import centre

Sample = dict[str, Tensor]

# --- starts


def both(starts: list[Callable[[nn.Module], None]]) -> Callable[[nn.Module], None]:
    """Several starts, one after another."""

    def start(student: nn.Module) -> None:
        for each in starts:
            each(student)

    return start


def branches(factor: float) -> Callable[[nn.Module], None]:
    """Every binary branch's gain, the weight of its norm, times a factor."""

    @torch.no_grad()
    def start(student: nn.Module) -> None:
        for _, layer in binary_layers(student):
            assert layer.norm is not None
            layer.norm.weight.mul_(factor)  # type: ignore[operator,union-attr]

    return start


def rectified(slope: float) -> Callable[[nn.Module], None]:
    """RPReLU as a leaky ReLU: its slope, and no shift."""

    @torch.no_grad()
    def start(student: nn.Module) -> None:
        for module in student.modules():
            if isinstance(module, RPReLU):
                module.slope.fill_(slope)
                module.bias_out.zero_()

    return start


def leaky(slope: float) -> Callable[[nn.Module], None]:
    """RPReLU from another slope, each layer's with the shift that centres it."""

    @torch.no_grad()
    def centred(student: nn.Module) -> None:
        for _, layer in binary_layers(student):
            if isinstance(layer.activation, RPReLU) and layer.norm is not None:
                bypass = layer.bypass is not None and not layer.activation_first
                centre(layer.activation, layer.norm, bypass=bypass)

    return both([rectified(slope), centred])


class Gained(Bypass):
    """A bypass times a gain: per channel and learned from ``start``, or one that rises from 0 to 1 as training goes on.

    Args:
        of: the bypass.
        until: the share of the training in which the gain rises to 1, or None where it is learned.
        start: the gain at first.
    """

    def __init__(self, of: Bypass, until: float | None, start: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in of.__dict__.items() if not k.startswith("_")})
        self.training = of.training
        self.until = until
        self.risen = start
        self.gain = nn.Parameter(torch.full((of.out_channels,), start)) if until is None else None

    def set_progress(self, fraction: float) -> None:
        """See ``bidensify.nn.set_progress``."""
        if self.until is not None:
            self.risen = min(1.0, fraction / self.until)

    def _factor(self) -> Any:
        return self.risen if self.gain is None else self.gain.view(1, -1, 1, 1)

    def after_fusion_down(self, x: Tensor, size: Any) -> Tensor:
        """As ``Bypass`` has it, times the gain."""
        return super().after_fusion_down(x, size) * self._factor()

    def exact(self, x: Tensor, size: Any) -> Tensor | None:
        """The same where nothing is trained."""
        found = super().exact(x, size)
        return None if found is None else found * self._factor()


def bypass_gain(until: float | None, gain: float = 0.0) -> Callable[[nn.Module], None]:
    """Every bypass behind a gain."""

    def start(student: nn.Module) -> None:
        for _, layer in binary_layers(student):
            if layer.bypass is not None:
                layer.bypass = Gained(layer.bypass, until, gain)

    return start


def no_bypass(student: nn.Module) -> None:
    """No layer has a bypass."""
    for _, layer in binary_layers(student):
        layer.bypass = None


def in_order(until: float, backwards: bool) -> Callable[[nn.Module], None]:
    """Layers become binary one after another."""

    def start(student: nn.Module) -> None:
        student.add_module("lever", InOrder(student, until, backwards))

    return start


class InOrder(nn.Module):
    """Switches a network's binary layers on, one by one, until a share of the training is done."""

    def __init__(self, student: nn.Module, until: float, backwards: bool) -> None:
        super().__init__()
        layers = [layer for _, layer in binary_layers(student)]
        self.__dict__["layers"] = layers[::-1] if backwards else layers
        self.until = until

    def set_progress(self, fraction: float) -> None:
        """See ``bidensify.nn.set_progress``."""
        for index, layer in enumerate(self.layers):
            on = fraction >= self.until * index / len(self.layers)
            layer.binarizer.enabled = layer.binarize_weights = on


# --- after each step


def _latent(student: nn.Module) -> list[tuple[Any, nn.Parameter]]:
    return [(layer, layer.latent_parameters()[0]) for _, layer in binary_layers(student)]


class Clipped:
    """Latent weights within some times their channel's mean magnitude."""

    def __init__(self, student: nn.Module, times: float) -> None:
        self.pairs, self.times = _latent(student), times

    @torch.no_grad()
    def __call__(self) -> None:
        for layer, weight in self.pairs:
            if layer.binarize_weights:
                part = layer.weight_binarizer
                bound = self.times * part.like(part.channel_scale(weight), weight)
                weight.copy_(weight.clamp(-bound, bound))


class Frozen:
    """From a share of the steps on no latent weight changes its sign."""

    def __init__(self, student: nn.Module, begins: float, steps: int = 14 * 37) -> None:
        self.pairs, self.begins, self.step = _latent(student), begins * steps, 0
        self.signs: list[Tensor] = []

    @torch.no_grad()
    def __call__(self) -> None:
        self.step += 1
        if self.step < self.begins:
            return
        self.signs = self.signs or [sign(weight) for _, weight in self.pairs]
        for (_, weight), signs in zip(self.pairs, self.signs, strict=True):
            weight.copy_(torch.where(sign(weight) == signs, weight, signs * 1e-8))


class Damped:
    """Weights that flip often are held at the sign that they had more of the time."""

    def __init__(self, student: nn.Module, most: float, momentum: float = 0.02) -> None:
        self.pairs, self.most, self.momentum = _latent(student), most, momentum
        self.signs = [sign(weight) for _, weight in self.pairs]
        self.flips = [torch.zeros_like(each) for each in self.signs]
        self.means = [each.clone() for each in self.signs]
        self.held = [torch.zeros_like(each, dtype=torch.bool) for each in self.signs]

    @torch.no_grad()
    def __call__(self) -> None:
        for i, (layer, weight) in enumerate(self.pairs):
            if not layer.binarize_weights:
                continue
            now = sign(weight)
            self.flips[i].lerp_((now != self.signs[i]).to(now.dtype), self.momentum)
            self.means[i].lerp_(now, self.momentum)
            self.held[i] |= self.flips[i] > self.most
            kept = sign(self.means[i])
            weight.copy_(torch.where(self.held[i] & (now != kept), kept * 1e-8, weight))
            self.signs[i] = sign(weight)


# --- data


class Mixed(Dataset[Sample]):
    """Every second sample with a part of another one, image and mask alike.

    Args:
        data: the samples.
        kind: "cut" (CutMix, Yun et al. 2019: a rectangle of a quarter of the area on average) or "class" (ClassMix, Olsson et
            al. 2021, by true masks: half of the other's classes).
    """

    def __init__(self, data: Any, kind: str) -> None:
        self.data, self.kind, self.info = data, kind, data.info

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        # Labels that are not mixed (depth) would be wrong.
        whole: Sample = self.data[index]
        sample = {key: whole[key] for key in ("image", "mask")}
        if torch.rand(()) < 0.5:
            return sample
        other: Sample = self.data[int(torch.randint(len(self.data), ()))]
        mask = other["mask"]
        if self.kind == "class":
            classes = mask.unique()
            chosen = classes[torch.randperm(len(classes))[: (len(classes) + 1) // 2]]
            inside = torch.isin(mask, chosen)
        else:
            inside = torch.zeros_like(mask, dtype=torch.bool)
            height, width = mask.shape
            share = float(torch.rand(())) ** 0.5
            rows, columns = int(height * share * 0.7), int(width * share * 0.7)
            top, left = int(torch.randint(height - rows + 1, ())), int(torch.randint(width - columns + 1, ()))
            inside[top : top + rows, left : left + columns] = True
        return {key: torch.where(inside, other[key], value) for key, value in sample.items()}


# --- parts


class AnnealedBinarizer(DistributionAdaptiveBinarizer):
    """alpha * tanh(t s / mean|s|), t from 1 to 100 in the first half of the training; then DAB."""

    codes = DistributionAdaptiveBinarizer.codes
    stored = DistributionAdaptiveBinarizer.stored
    fraction = 0.0

    def set_progress(self, fraction: float) -> None:
        self.fraction = fraction

    def binarize(self, x: Tensor) -> Tensor:
        if self.fraction >= 0.5:
            return super().binarize(x)
        shifted = x - self._threshold(x)
        distance = shifted.detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
        return self._scale(shifted.detach()) * torch.tanh(10 ** (4 * self.fraction) / distance * shifted)


@bd.register_method(
    "bidense-annealed",
    activation=rprelu,
    bypass="all",
    activation_first=True,
    citation="annealed tanh, as in BATS and HWGQ's heirs",
)
def annealed(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
    """BiDense with activations that become signs."""
    binarizer = AnnealedBinarizer(spec.in_channels, config.act_scale, spec.dim, config.act_bits)
    return LayerParts(binarizer, get_method("bidense").parts(spec, config).weight_binarizer)


@bd.register_method(
    "bidense-recu", activation=rprelu, bypass="all", activation_first=True, citation="ReCU, Xu et al., ICCV 2021"
)
def recu_weights(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
    """BiDense's activations, ReCU's weights."""
    return LayerParts(
        get_method("bidense").parts(spec, config).binarizer, get_method("recu").parts(spec, config).weight_binarizer
    )


class DPReLU(nn.Module):
    """PokeBNN's activation (Zhang et al., CVPR 2022): a slope for each side, a shift before and one behind, per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias_in, self.bias_out = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.slope, self.upper = nn.Parameter(torch.full((channels,), 0.25)), nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        x = x + self.bias_in.view(shape)
        return torch.where(x >= 0, x * self.upper.view(shape), x * self.slope.view(shape)) + self.bias_out.view(shape)


@bd.register_method(
    "bidense-dprelu",
    activation=lambda channels, dim: DPReLU(channels),
    bypass="all",
    activation_first=True,
    citation="PokeBNN, Zhang et al., CVPR 2022",
)
def dprelu(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
    """BiDense with PokeBNN's activation."""
    return get_method("bidense").parts(spec, config)
