"""Latent layers of every geometry, with parameters away from their initial values, so that a forgotten one shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import PackError
from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear, BinaryLayer, RPReLU

# Name -> (makes the layer, the shape of an input).
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "same 3x3": (lambda: BiDenseConv2d(20, 36, 3, padding=1), (2, 20, 9, 11)),
    "odd channels": (lambda: BiDenseConv2d(33, 47, 3, padding=1, bias=True), (2, 33, 10, 7)),
    "fusion down": (lambda: BiDenseConv2d(40, 12, 3, padding=1, bias=True), (1, 40, 5, 6)),
    "strided": (lambda: BiDenseConv2d(33, 64, 3, stride=2, padding=1), (2, 33, 9, 8)),
    "strided valid": (lambda: BiDenseConv2d(16, 16, (2, 4), stride=(2, 3)), (1, 16, 9, 17)),
    "dilated groups": (lambda: BiDenseConv2d(24, 48, 3, padding=4, dilation=4, groups=3), (1, 24, 13, 7)),
    "depthwise": (lambda: BiDenseConv2d(40, 40, 7, padding=3, groups=40), (2, 40, 12, 19)),
    "depthwise strided": (lambda: BiDenseConv2d(36, 36, 5, stride=2, padding=2, groups=36), (1, 36, 11, 18)),
    "same even": (lambda: BiDenseConv2d(16, 20, 4, padding="same"), (1, 16, 8, 9)),
    "pointwise": (lambda: BiDenseConv2d(48, 80, 1, act_scale="none"), (2, 48, 9, 9)),
    "one pixel": (lambda: BiDenseConv2d(70, 30, 3, padding=1), (3, 70, 1, 1)),
    "transposed 2x2": (lambda: BiDenseConvTranspose2d(48, 24, 2, 2), (2, 48, 5, 7)),
    "transposed 4x4": (lambda: BiDenseConvTranspose2d(20, 20, 4, 2, 1, bias=True), (1, 20, 6, 5)),
    "transposed groups": (
        lambda: BiDenseConvTranspose2d(24, 36, 3, (2, 3), 1, (1, 2), groups=4, dilation=2),
        (2, 24, 4, 5),
    ),
    "linear": (lambda: BiDenseLinear(40, 72, bias=True), (2, 13, 40)),
    "linear on an image": (lambda: BiDenseLinear(36, 20), (2, 4, 5, 36)),
    "linear on vectors": (lambda: BiDenseLinear(36, 36), (3, 36)),
    "no activation": (lambda: BiDenseConv2d(16, 16, 3, padding=1, activation=False), (1, 16, 6, 6)),
}


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics, affines and thresholds in every binary layer; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for layer in model.modules():
            if not isinstance(layer, BinaryLayer):
                continue
            for name, parameter in layer.binarizer.named_parameters():
                fill(parameter, -0.3, 0.3) if name != "a" else parameter.fill_(0.4)
            if layer.norm is not None:
                fill(layer.norm.running_mean, -1, 1)
                fill(layer.norm.running_var, 0.5, 2)
                fill(layer.norm.weight, -1.5, 1.5)
                fill(layer.norm.bias, -1, 1)
            if isinstance(layer.activation, RPReLU):
                for parameter in layer.activation.parameters():
                    fill(parameter, -0.5, 0.5)
    return model.eval()


def relative(got: Tensor, want: Tensor) -> float:
    """Largest error over the largest value."""
    assert got.shape == want.shape
    return float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-12))


def network() -> nn.Module:
    """Two packable layers between full-precision ones, with a ReLU; latent."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        BiDenseConv2d(16, 24, 3, 2, 1),
        nn.ReLU(),
        BiDenseConvTranspose2d(24, 8, 2, 2),
        nn.Conv2d(8, 4, 1),
    )
    return settle(layers)


def packed_with(method: str) -> nn.Module:
    """A packed network with one layer of a method; skips the test where the method does not pack."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    student = bd.bidensify(net, method=method, example_inputs=torch.randn(2, 3, 12, 12))
    bd.calibrate(student, [torch.randn(2, 3, 12, 12)])
    try:
        return bd.pack(student.eval())
    except PackError as error:
        pytest.skip(str(error))


class Layers(nn.Module):
    """Layers beside one another, each with an input of its own."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs))


class Decoder(nn.Module):
    """A concatenation of upsamplings before one layer, a residual around another, a norm of another order, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.down = BiDenseConv2d(16, 32, 3, 2, 1)
        self.joined = BiDenseConv2d(48, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.last = BiDenseConv2d(16, 16, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.stem(x)
        y = self.joined(torch.cat([F.interpolate(self.down(a), scale_factor=2), a], 1))
        y = self.last(F.interpolate(self.norm(y) + a, scale_factor=2.0, mode="nearest"))
        return {"scores": self.head(y), "features": y}
