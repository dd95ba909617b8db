"""Activations of two bits: levels and gradients against straight autograd, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.methods import LayerSpec, get_method
from bidensify.nn import (
    ActivationBinarizer,
    DistributionAdaptiveBinarizer,
    ShiftedSign,
    SignBinarizer,
    calibrate,
    threshold_levels,
)

SHAPES = [((3, 5, 6, 4), 1), ((2, 5, 7), 1), ((2, 9, 5), -1), ((4, 5), -1)]


def quantized(x: Tensor, step: Tensor) -> Tensor:
    """The nearest of -1.5, -0.5, 0.5 and 1.5 steps, a tie going up, as a learned step size has it (LSQ)."""
    u = x / step
    through = torch.where(u.abs() <= 2, u, u.detach())
    levels = (torch.floor(u.detach()) + 0.5).clamp(-1.5, 1.5)
    return step * (through + (levels - through).detach())


def by_hand(binarizer: ActivationBinarizer, x: Tensor) -> Tensor:
    space = tuple(range(2, x.dim())) if binarizer.dim == 1 else tuple(range(1, x.dim() - 1))
    sample = tuple(range(1, x.dim()))

    def shaped(parameter: Tensor) -> Tensor:
        return parameter.reshape(1, -1, *([1] * (x.dim() - 2))) if binarizer.dim == 1 else parameter.flatten()

    shifted = x
    if isinstance(binarizer, DistributionAdaptiveBinarizer):
        mean = x.detach().mean(space, keepdim=True) if space else x.detach()
        shifted = x - (shaped(binarizer.k) * mean + shaped(binarizer.b))
        if binarizer.act_scale == "none":
            return quantized(shifted, x.new_ones(()))
        if binarizer.act_scale == "per_channel":
            sample = space
    elif isinstance(binarizer, ShiftedSign):
        shifted = x + shaped(binarizer.b)
    distance = shifted.detach().abs()
    distance = distance.mean(sample, keepdim=True) if sample else distance
    return quantized(shifted, 1.248 * torch.exp(binarizer.a) * distance)


@pytest.mark.parametrize("kind", ["per_tensor", "per_channel", "none", "sign", "shifted"])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_levels_and_gradients(kind: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made: ActivationBinarizer
    if kind == "sign":
        made = SignBinarizer(5, dim, planes=2)
    elif kind == "shifted":
        made = ShiftedSign(5, dim, planes=2)
    else:
        made = DistributionAdaptiveBinarizer(5, kind, dim, 2)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = (torch.randn(shape, dtype=torch.float64) * 2).requires_grad_()
    # The reference is in float64; a value nearer to a threshold than rounding is in neither.
    made = made.double()
    theirs = by_hand(made, x)
    inputs = [x, *(p for p in made.parameters() if p.requires_grad)]
    weight = torch.randn_like(x)
    want = torch.autograd.grad((theirs * weight).sum(), inputs)
    made = made.to(dtype)
    y = x.detach().to(dtype).requires_grad_()
    ours = made(y)
    got = torch.autograd.grad((ours * weight.to(dtype)).sum(), [y, *(p for p in made.parameters() if p.requires_grad)])
    close = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours.double(), theirs, **close)
    for mine, other in zip(got, want):
        torch.testing.assert_close(mine.double(), other.double(), **close)
    if kind not in ("per_channel", "none"):
        assert len(ours.detach().flatten(1)[0].abs().unique()) <= 2


def test_ties_go_up_and_zero_is_no_level() -> None:
    step, beta = torch.tensor(0.5), torch.tensor(0.25)
    x = torch.tensor([-0.25, -0.250001, 0.25, 0.2499, 0.75, 0.7499, -9.0, 9.0, -0.0, 0.0])
    want = torch.tensor([-0.25, -0.75, 0.25, -0.25, 0.75, 0.25, -0.75, 0.75, -0.25, -0.25])
    assert torch.equal(threshold_levels(x, beta, step), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_inputs_give_finite_gradients(dtype: torch.dtype) -> None:
    binarizer = DistributionAdaptiveBinarizer(3, planes=2)
    with torch.no_grad():
        binarizer.k.fill_(1.0)
    binarizer = binarizer.to(dtype)
    x = torch.full((2, 3, 4, 4), 1.5, dtype=dtype, requires_grad=True)
    y = binarizer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in binarizer.parameters())


def test_the_step_is_the_best_of_a_gaussian() -> None:
    x = torch.randn(1, 4, 200, 200, generator=torch.Generator().manual_seed(0)).double()

    def error(a: float) -> float:
        binarizer = SignBinarizer(4, planes=2).double()
        with torch.no_grad():
            binarizer.a.fill_(a)
            return float((binarizer(x) - x).square().mean())

    # Max, 1960: four uniform levels leave 0.1188 of the variance.
    assert abs(error(0.0) - 0.1188) < 0.002
    assert error(0.0) < min(error(-0.05), error(0.05))


def test_calibration_balances_both_planes() -> None:
    layer = bd.nn.BiDenseConv2d(4, 4, 3, padding=1, act_bits=2)
    x = torch.randn(2, 4, 16, 16) + torch.tensor([3.0, -2.0, 0.5, 0.0]).view(1, -1, 1, 1)
    calibrate(layer, [x])
    with torch.no_grad():
        values = layer.binarizer(x).movedim(1, 0).flatten(1)
    shares = torch.stack([(values < -0.9).float().mean(1), ((values < 0) & (values > -0.9)).float().mean(1)])
    assert bool((shares > 0.08).all())


@pytest.mark.parametrize("planes", [0, 3])
def test_other_numbers_of_planes(planes: int) -> None:
    with pytest.raises(ConfigError, match=f"planes={planes} must be 1 or 2"):
        DistributionAdaptiveBinarizer(4, planes=planes)


def test_dorefa_rounds_to_thirds() -> None:
    part = (
        get_method("dorefa").parts(LayerSpec("conv2d", 4, 4), bd.BidensifyConfig(method="dorefa", act_bits=2)).binarizer
    )
    x = torch.linspace(-1, 2, 3001, dtype=torch.float64).view(1, 1, 1, -1).repeat(1, 4, 1, 1).requires_grad_()
    y = part(x)
    torch.testing.assert_close(y, (3 * x.clamp(0, 1)).round() / 3, rtol=0, atol=1e-7)
    y.sum().backward()
    inside = (x - 0.5).abs()
    off = (inside - 0.5).abs() > 1e-6
    assert torch.equal(x.grad[off], (inside <= 0.5).double()[off])
