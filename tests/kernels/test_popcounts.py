"""The forward pass on bits against torch's convolution over the same two values, and its gradients against autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bidensify import nn as bnn
from bidensify.kernels import popcounts, training_ops
from bidensify.nn.native import countable

pytestmark = pytest.mark.skipif(popcounts._tier() is None, reason="no fast kernels on this machine")

# channels in and out, kernel, stride, padding, dilation, groups
GEOMETRIES = [
    (24, 24, 3, 1, 1, 1, 1),
    (48, 96, 3, 2, 1, 1, 1),
    (144, 40, 3, 1, 0, 1, 1),
    (70, 33, 3, 1, 2, 2, 1),
    (64, 64, 1, 1, 0, 1, 1),
    (256, 128, 3, 1, 1, 1, 2),
    (96, 48, 1, 2, 0, 1, 1),
    (64, 64, 9, 1, 4, 1, 64),
]


def given(channels: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, 13, 18).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["plain weight", "channels_last weight"])
def test_sums_are_those_of_a_convolution_over_signs(geometry: tuple[int, ...], last: bool) -> None:
    torch.manual_seed(0)
    cin, cout, kernel, stride, padding, dilation, groups = geometry
    x, weight = given(cin), torch.randn(cout, cin // groups, kernel, kernel)
    weight[0, 0] = -0.0
    weight = weight.to(memory_format=torch.channels_last) if last else weight
    thresholds, alpha = torch.randn(3, cin), torch.rand(3) + 0.5
    signs = torch.where(x >= thresholds[:, :, None, None], 1.0, -1.0)
    place = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    want = F.conv2d(signs, torch.where(weight >= 0, 1.0, -1.0), None, *place)
    y = popcounts.binary_conv(x, thresholds, None, weight, torch.ones(cout), None, *place)
    assert torch.equal(y, want)
    scale, bias = torch.rand(cout), torch.randn(cout)
    levels = torch.stack([-alpha, alpha], 1)
    y = popcounts.binary_conv(x, thresholds, levels, weight, scale, bias, *place)
    want = want * alpha.view(-1, 1, 1, 1) * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sums_of_four_levels(geometry: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    cin, cout, kernel, stride, padding, dilation, groups = geometry
    x, weight, thresholds, step = given(cin), torch.randn(cout, cin // groups, kernel, kernel), torch.randn(3, cin), 0.5
    u = (x - thresholds[:, :, None, None]) / step
    levels = (u.floor() + 0.5).clamp(-1.5, 1.5)
    place = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    want = step * F.conv2d(levels, torch.where(weight >= 0, 1.0, -1.0), None, *place)
    values = torch.tensor([[-step, step]]).repeat(3, 1)
    y = popcounts.binary_conv(x, thresholds, values, weight, torch.ones(cout), None, *place, 2)
    assert torch.equal(y, want)


@pytest.mark.parametrize("geometry", GEOMETRIES[:-1], ids=str)
@pytest.mark.parametrize("act_scale", ["per_tensor", "none"])
@pytest.mark.parametrize("act_bits", [1, 2])
def test_a_training_step_is_that_of_the_float_convolution(
    geometry: tuple[int, ...], act_scale: str, act_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    cin, cout, kernel, stride, padding, dilation, groups = geometry
    layer = bnn.BiDenseConv2d(
        cin, cout, kernel, stride, padding, dilation, groups, bias=True, act_scale=act_scale, act_bits=act_bits
    )
    with torch.no_grad():
        for parameter in (layer.binarizer.k, layer.binarizer.b, layer.binarizer.a):
            parameter.normal_(std=1.0 if act_bits == 1 else 0.3)
    x = given(cin)
    assert countable(layer, x)
    weights = torch.randn(layer(x).shape)

    def step() -> list[Tensor]:
        start = x.clone(memory_format=torch.preserve_format).requires_grad_()
        layer.zero_grad()
        y = layer(start)
        (y * weights).sum().backward()
        # BatchNorm takes the bias out again: its gradient is 0 to rounding.
        return [
            y,
            start.grad,
            *(p.grad for name, p in layer.named_parameters() if p.grad is not None and name != "bias"),
        ]

    on_bits = step()
    monkeypatch.setattr(popcounts, "takes", lambda x, weight: False)
    assert not countable(layer, x)
    for got, want in zip(on_bits, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["SignBinarizer", "ShiftedSign"])
@pytest.mark.parametrize("planes", [1, 2])
def test_binarizers_without_a_kernel_are_counted_too(method: str, planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = bnn.BiDenseConv2d(32, 48, 3, padding=1)
    layer.binarizer = getattr(__import__("bidensify.nn.signs", fromlist=[method]), method)(32, planes=planes)
    x = given(32).requires_grad_()
    layer(x).square().sum().backward()
    got, x.grad = x.grad, None
    monkeypatch.setattr(popcounts, "takes", lambda x, weight: False)
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-4)


def test_an_input_changed_in_place_is_noticed() -> None:
    layer = bnn.BiDenseConv2d(32, 32, 3, padding=1)
    layer.bypass = None
    x = given(32).requires_grad_()
    start = x * 1
    y = layer(start)
    start.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("change", ["plain", "bfloat16", "narrow", "weights", "reflect"])
def test_what_is_left_to_the_convolution(change: str) -> None:
    layer = bnn.BiDenseConv2d(4 if change == "narrow" else 32, 32, 3, padding=1)
    x = given(layer.in_channels)
    if change == "plain":
        x = x.contiguous()
    if change == "bfloat16":
        x = x.bfloat16()
    if change == "weights":
        layer.binarize_weights = False
    if change == "reflect":
        layer.padding_mode = "reflect"
    assert not countable(layer, x)


def test_a_wrong_size_is_refused() -> None:
    x, weight = given(32), torch.randn(16, 32, 3, 3)
    with pytest.raises(RuntimeError, match=r"scale of shape \(8,\) must be \(16,\)"):
        popcounts.binary_conv(x, None, None, weight, torch.ones(8), None, [1, 1], [1, 1], [1, 1], 1)
    with pytest.raises(RuntimeError, match="give a larger input"):
        popcounts.binary_conv(x[:, :, :1, :1], None, None, weight, torch.ones(16), None, [1, 1], [0, 0], [1, 1], 1)


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (32, 16), (7, 3)])
def test_maps_of_one_pixel_have_their_bypass_without_the_signs(channels: int, groups: int) -> None:
    """They are contiguous and in channels_last at once."""
    k, b, a = torch.rand(1, channels, 1, 1), torch.rand(1, channels, 1, 1), torch.rand(())
    x = torch.randn(2, channels, 1, 1).contiguous(memory_format=torch.channels_last)
    found = []
    for signs in (True, False):
        room = [torch.full((2 * groups,), torch.nan) for _ in range(4)]
        del room  # what is not written shows
        found.append(training_ops.dab(x, k, b, a, training_ops.SCALES["per_tensor"], groups, 1, signs)[1])
    assert torch.equal(*found)
    wanted = torch.stack([x[:, group::groups].mean(1) for group in range(groups)], 1)
    assert torch.allclose(found[1], wanted, atol=1e-6)
