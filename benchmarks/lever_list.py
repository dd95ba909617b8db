"""The levers of ``levers.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import bidensify as bd
from bidensify.methods import LayerParts, LayerSpec, get_method
from bidensify.methods.around import rprelu
from bidensify.nn import Bypass, DistributionAdaptiveBinarizer, RPReLU, binary_layers, sign

Sample = dict[str, Tensor]
After = Callable[[], None]


@dataclass(frozen=True)
class Lever:
    """One change.

    Attributes:
        text: what it is.
        recipe: path -> value, as ``bidensify finetune --set`` has it.
        start: changes the untrained student in place.
        after_step: of a student, what follows each optimizer step.
        data: wraps the training set.
    """

    text: str
    recipe: dict[str, Any] = field(default_factory=dict)
    start: Callable[[nn.Module], None] | None = None
    after_step: Callable[[nn.Module], After] | None = None
    data: Callable[[Dataset[Sample]], Dataset[Sample]] | None = None


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe with other values at some paths."""
    data = copy.deepcopy(base)
    for path, value in changes.items():
        place: Any = data
        *parents, last = path.split(".")
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = value
    return data


def rates(first: float, second: float | None = None) -> dict[str, Any]:
    """Another learning rate of both stages."""
    return {"stages.0.lr": first, "stages.1.lr": first if second is None else second}


def lengths(first: int, second: int) -> dict[str, Any]:
    """Other lengths of the stages."""
    return {"stages.0.epochs": first, "stages.1.epochs": second}


def both(starts: list[Callable[[nn.Module], None]]) -> Callable[[nn.Module], None]:
    """Several starts, one after another."""

    def start(student: nn.Module) -> None:
        for each in starts:
            each(student)

    return start


# --- starts


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
        sample: Sample = self.data[index]
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
        return {
            key: torch.where(inside, other[key], value) for key, value in sample.items() if key in ("image", "mask")
        }


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
    "bidense-annealed", activation=rprelu, bypass="all", citation="annealed tanh, as in BATS and HWGQ's heirs"
)
def annealed(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
    """BiDense with activations that become signs."""
    binarizer = AnnealedBinarizer(spec.in_channels, config.act_scale, spec.dim, config.act_bits)
    return LayerParts(binarizer, get_method("bidense").parts(spec, config).weight_binarizer)


@bd.register_method("bidense-recu", activation=rprelu, bypass="all", citation="ReCU, Xu et al., ICCV 2021")
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
    citation="PokeBNN, Zhang et al., CVPR 2022",
)
def dprelu(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
    """BiDense with PokeBNN's activation."""
    return get_method("bidense").parts(spec, config)


# The scenes' U-Net: its latent weights, its activations' parameters.
LATENT = ("encoder.*.conv?.weight", "encoder.*.downsample.0.weight", "decoder.*.conv?.0.weight")
RPRELU = ("*.slope", "*.bias_in", "*.bias_out")
FEATURES = {"weight": 1.0, "kind": "attention", "layers": ["decoder.0", "decoder.1", "decoder.2"]}
# Where the first stage ends.
SECOND = 4 / 14
# The rate that won; levers from here on are changes of it.
FAST = rates(6e-3)
ONE = {**FAST, "stages.0.binarize": "all", "stages.0.schedule": "constant"}

LEVERS: dict[str, Lever] = {
    "default": Lever("lr 3e-3 then 2e-3, 4 epochs of binary activations, 10 of all"),
    "lr 6e-3": Lever("6e-3 in both stages", FAST),
    "lr 1e-2": Lever("1e-2 in both stages", rates(1e-2)),
    "lr 2e-2": Lever("2e-2 in both stages", rates(2e-2)),
    "branches x 0.5": Lever("every binary branch's gain halved at the start", FAST, branches(0.5)),
    "branches x 0.3": Lever("times 0.3", FAST, branches(0.3)),
    "residual double": Lever("adds stay and every bypass too", {**FAST, "binarize.residual": "double"}),
    "batch 8": Lever("batches of 8: twice the steps on the same images", {**FAST, "data.batch_size": 8}),
    "one stage": Lever(
        "14 epochs with everything binary", {**FAST, "stages.0.binarize": "all", "stages.0.schedule": "cosine"}
    ),
    "first stage of 7": Lever("7 epochs of binary activations, 7 of all", {**FAST, **lengths(7, 7)}),
    "first stage of 10": Lever("10 and 4", {**FAST, **lengths(10, 4)}),
    "ReLU at first": Lever("RPReLU starts with slope 0 and no shift", FAST, rectified(0.0)),
    "teacher at first, gain learned": Lever(
        "adds stay; bypasses have a learned gain per channel that starts at 0, RPReLU slope 0: with float layers the student "
        "starts as the teacher",
        {**FAST, "binarize.residual": "double"}, both([rectified(0.0), bypass_gain(None)]),
    ),
    "gain learned from 1": Lever(
        "adds stay; a learned gain per channel on bypasses that starts at 1", {**FAST, "binarize.residual": "double"},
        bypass_gain(None, 1.0),
    ),
    "teacher at first, gain rises": Lever(
        "the same as learned from 0, but the gain rises from 0 to 1 in the first stage, and is gone then",
        {**FAST, "binarize.residual": "double"}, both([rectified(0.0), bypass_gain(SECOND)]),
    ),
    "EMA 0.95": Lever("decay 0.95 (default 0.98)", {**FAST, "ema.decay": 0.95}),
    "EMA 0.99": Lever("decay 0.99", {**FAST, "ema.decay": 0.99}),
    "no EMA": Lever("the last weights", {**FAST, "ema": None}),
    "latent decay 0.01": Lever("latent weights decay in the last stage too", {**FAST, "optimizer.latent_weight_decay": 0.01}),
    "latent x 3": Lever("latent weights learn three times as fast", {**FAST, "optimizer.lr_scale": dict.fromkeys(LATENT, 3.0)}),
    "latent x 0.3": Lever("and a third as fast", {**FAST, "optimizer.lr_scale": dict.fromkeys(LATENT, 0.3)}),
    "thresholds x 5": Lever("k, b and a learn five times as fast", {**FAST, "optimizer.lr_scale": {"*.binarizer.*": 5.0}}),
    "thresholds x 0.2": Lever("and a fifth as fast", {**FAST, "optimizer.lr_scale": {"*.binarizer.*": 0.2}}),
    "RPReLU x 5": Lever("slopes and shifts learn five times as fast", {**FAST, "optimizer.lr_scale": dict.fromkeys(RPRELU, 5.0)}),
    "beta2 0.99": Lever("AdamW's second beta", {**FAST, "optimizer.betas": [0.9, 0.99]}),
    "KL x 3": Lever("the teacher's weight", {**FAST, "stages.0.losses.kl.weight": 3.0, "stages.1.losses.kl.weight": 3.0}),
    "features": Lever(
        "attention maps of the decoder's blocks", {**FAST, "stages.0.losses.features": FEATURES, "stages.1.losses.features": FEATURES}
    ),
    "scale 0.5 to 2": Lever("larger scales (default 0.75 to 1.5)", {**FAST, "data.augment.scale": [0.5, 2.0]}),
    "no scale": Lever("neither zoom nor colours", {**FAST, "data.augment.scale": [1.0, 1.0], "data.augment.color_jitter": 0.0}),
    "CutMix": Lever("a rectangle of another sample in every second image", FAST, data=lambda data: Mixed(data, "cut")),
    "ClassMix": Lever("half the classes of another sample in every second image", FAST, data=lambda data: Mixed(data, "class")),
    "latent clip": Lever("after each step within 2 s_o", FAST, after_step=lambda student: Clipped(student, 2.0)),
    "signs frozen at the end": Lever("no sign flips in the last 30 %", FAST, after_step=lambda student: Frozen(student, 0.7)),
    "oscillations frozen": Lever(
        "weights whose sign flips in over 4 % of the last steps keep their more frequent one (Nagel et al., ICML 2022)", FAST,
        after_step=lambda student: Damped(student, 0.04),
    ),
    "no norms at the end": Lever("statistics are not taken again for the average", {**FAST, "calibrate.at_end": False}),
    "layers from the front": Lever("one stage; layers become binary one by one in the first half", ONE, in_order(0.5, False)),
    "layers from the back": Lever("in the reverse order", ONE, in_order(0.5, True)),
    "annealed tanh": Lever(
        "one stage; activations alpha tanh(t s / mean|s|), t from 1 to 100 in the first half, then signs",
        {**ONE, "binarize.method": "bidense-annealed"},
    ),
    "weights of ReCU": Lever("standardised, clamped to a quantile, learned scale", {**FAST, "binarize.method": "bidense-recu"}),
    "DPReLU": Lever("PokeBNN's: two slopes, shifts", {**FAST, "binarize.method": "bidense-dprelu"}),
}  # fmt: skip
