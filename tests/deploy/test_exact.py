"""Latent layers in evaluation mode and packed ones give the same bits: every method, kernel, memory format, thread count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import settle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy import pack
from bidensify.deploy.backends import available_kernels
from bidensify.deploy.freeze import freeze
from bidensify.errors import ConfigError
from bidensify.exact import latent, own_codes
from bidensify.kernels import dense as training
from bidensify.kernels import evaluation_ops
from bidensify.methods import get_method
from bidensify.models.unet import unet
from bidensify.nn import (
    ActivationBinarizer,
    BiDenseConv2d,
    BiDenseLinear,
    Bypass,
    DistributionAdaptiveBinarizer,
    RPReLU,
    SignBinarizer,
    WeightBinarizer,
    make_binary,
)

CONVOLUTIONAL = [name for name in bd.available_methods() if get_method(name).takes("conv2d")]

KERNELS = available_kernels()
CHANNELS = st.sampled_from([1, 3, 8, 16, 20, 31, 33, 48, 64, 70])


class Lopsided(ActivationBinarizer):
    """Thresholds and two free values of its own, per sample: what no packed layer stores."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.shift = nn.Parameter(torch.linspace(-0.3, 0.3, channels).view(1, -1, 1, 1))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = x.detach().float().abs().amax((1, 2, 3), keepdim=True)
        return self.shift.to(x.dtype), (-0.4 * size).to(x.dtype), (1.1 * size).to(x.dtype)

    def binarize(self, x: Tensor) -> Tensor:
        beta, low, high = self.codes(x)
        return torch.where(x >= beta, high, low)


def binary(base: nn.Module, binarizer: ActivationBinarizer, bypass: bool, activation: nn.Module | None) -> nn.Module:
    """``base`` with a bypass of its geometry, BatchNorm and the given parts."""
    transposed = isinstance(base, nn.ConvTranspose2d)
    geometry = (base.kernel_size, base.stride, base.padding, base.dilation)
    base.__class__ = make_binary(type(base))
    layer: Any = base
    layer.install(
        binarizer=binarizer,
        weight_binarizer=WeightBinarizer(transposed=transposed, groups=base.groups),
        norm=nn.BatchNorm2d(base.out_channels),
        bypass=Bypass(base.in_channels, base.out_channels, *geometry, transposed=transposed) if bypass else None,
        activation=activation,
    )
    return layer


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer with random parameters, and an input's shape."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    cin, cout = groups * draw(CHANNELS), groups * draw(CHANNELS)
    kind = draw(st.sampled_from(["conv", "conv", "pooled", "depthwise", "transposed", "linear", "pointwise"]))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    bias = draw(st.booleans())
    batch, height, width = draw(st.integers(1, 2)), draw(st.integers(7, 12)), draw(st.integers(7, 20))
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    if kind == "linear":
        layer = BiDenseLinear(cin, cout, bias, draw(st.sampled_from(["per_tensor", "none"])))
        return settle(layer), draw(st.sampled_from([(batch, cin), (batch, height, cin), (batch, height, width, cin)]))
    if kind == "depthwise":
        groups = cin = cout = draw(st.sampled_from([2, 16, 33, 64]))
    if kind == "pooled":
        kernel, stride, padding, dilation = (3, 3), (2, 2), (1, 1), (1, 1)
    if kind == "pointwise":
        kernel, stride, padding, dilation = (1, 1), (1, 1), (0, 0), (1, 1)
    if kind == "transposed":
        base: nn.Module = nn.ConvTranspose2d(cin, cout, kernel, stride, padding, 0, groups, bias, dilation)
    else:
        base = nn.Conv2d(cin, cout, kernel, stride, padding, dilation, groups, bias)
    binarizer: ActivationBinarizer = draw(
        st.sampled_from(
            [
                DistributionAdaptiveBinarizer(cin),
                DistributionAdaptiveBinarizer(cin),
                DistributionAdaptiveBinarizer(cin, "none"),
                SignBinarizer(cin),
                Lopsided(cin),
            ]
        )
    )
    activation = draw(st.sampled_from([RPReLU(cout), RPReLU(cout), nn.Identity(), nn.LeakyReLU(0.1), nn.Hardtanh()]))
    return settle(binary(base, binarizer, draw(st.booleans()), activation)), (batch, cin, height, width)


class Varying(Lopsided):
    """A threshold per pixel."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, low, high = super().codes(x)
        return x.mean(1, keepdim=True), low, high


def test_a_threshold_per_pixel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a threshold of shape \(2, 1, 5, 6\) varies over space; .* one per channel"):
        own_codes(Varying(8), torch.randn(2, 8, 5, 6))


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), st.sampled_from([1, 2, 3]))
def test_latent_and_packed_layers_give_the_same_bits(
    case: tuple[nn.Module, tuple[int, ...]], dtype: torch.dtype, threads: int
) -> None:
    layer, shape = case
    x = (torch.randn(shape) * 2 + 0.3).to(dtype)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(threads)
            want = layer(x)
            assert want.dtype == dtype
            torch.set_num_threads(before)
            if x.dim() == 4 and not isinstance(layer, nn.Linear):
                assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), want)
                assert want.is_contiguous(memory_format=torch.channels_last)
            for kernel in KERNELS:
                torch.set_num_threads(threads)
                assert torch.equal(freeze(layer, kernel=kernel)(x), want), kernel
    finally:
        torch.set_num_threads(before)


class Net(nn.Module):
    """An encoder and decoder with what networks have between their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 40, 3, 2, 1, bias=False), nn.BatchNorm2d(40), nn.ReLU())
        self.block1 = nn.Sequential(nn.Conv2d(40, 40, 3, padding=1, bias=False), nn.BatchNorm2d(40), nn.ReLU())
        self.block2 = nn.Sequential(nn.Conv2d(40, 40, 3, padding=1, bias=False), nn.BatchNorm2d(40))
        self.act = nn.ReLU()
        self.up = nn.ConvTranspose2d(40, 16, 2, 2)
        self.fuse = nn.Sequential(
            nn.Conv2d(32, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 5, padding=2, groups=24)
        )
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.down(a)
        b = self.act(b + self.block2(self.block1(b)))
        return self.head(self.fuse(torch.cat([a, self.up(b)], 1)))


@pytest.mark.parametrize("method", CONVOLUTIONAL)
def test_whole_networks_give_the_same_bits(method: str) -> None:
    torch.manual_seed(0)
    student = bd.bidensify(Net(), method=method)
    bd.calibrate(student, [torch.randn(4, 3, 24, 32)])
    student.eval()
    x = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        want = student(x)
        for kernel in KERNELS:
            assert torch.equal(pack(student, kernel=kernel)(x), want), kernel
    with torch.inference_mode():
        assert torch.equal(pack(student)(x), want)
        assert torch.equal(student(x), want)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 7), (1, 1)])
def test_a_network_with_float_layers_gives_the_same_bits_in_channels_last(size: tuple[int, int]) -> None:
    """PyTorch's own layers round by memory format; ``pack`` puts them in channels_last."""
    torch.manual_seed(0)
    student = bd.bidensify(unet(width=8))
    bd.calibrate(student, [torch.randn(4, 3, 32, 32)])
    student.eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = student(x)
        for kernel in KERNELS:
            assert torch.equal(pack(student, kernel=kernel)(x), want), kernel


def test_evaluation_mode_still_has_gradients_where_they_are_wanted() -> None:
    layer: Any = settle(BiDenseConv2d(20, 36, 3, padding=1))
    x = torch.randn(2, 20, 9, 9)
    assert latent.evaluate(layer, x, (), {}) is None
    layer(x).sum().backward()
    assert layer.latent_weight.grad is not None
    layer.requires_grad_(False)
    assert latent.evaluate(layer, x, (), {}) is not None
    given = x.clone().requires_grad_()
    layer(given).sum().backward()
    assert given.grad is not None
    layer.train()
    with torch.no_grad():
        assert latent.evaluate(layer, x, (), {}) is None


def test_a_latent_layer_on_the_meta_device_gives_its_shape() -> None:
    layer = settle(BiDenseConv2d(20, 36, 3, 2, 1)).to("meta")
    with torch.no_grad():
        assert layer(torch.empty(2, 20, 9, 9, device="meta")).shape == (2, 36, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_layers_agree_on_every_instruction_set_and_without_kernels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [
        (settle(BiDenseConv2d(70, 33, 3, 2, 1)), (2, 70, 9, 13)),
        (settle(BiDenseConv2d(20, 64, 3, padding=1, act_scale="none")), (1, 20, 11, 17)),
        (settle(BiDenseLinear(33, 16)), (2, 67, 33)),
    ]
    chosen = training.instruction_set()
    for layer, shape in layers:
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            want = freeze(layer, kernel="reference")(x)
            for name in training.instruction_sets():
                training.use(name)
                assert torch.equal(layer(x), want), name
            if training.available():
                training.use(chosen)
            with monkeypatch.context() as patch:
                patch.setattr(evaluation_ops, "evaluates", lambda x: False)
                assert torch.equal(layer(x), want)
