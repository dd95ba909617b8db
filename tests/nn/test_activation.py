"""RPReLU against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidensify.nn import RPReLU


def filled(channels: int, dim: int = 1) -> RPReLU:
    layer = RPReLU(channels, dim)
    with torch.no_grad():
        layer.bias_in.normal_()
        layer.slope.uniform_(-0.5, 1.5)
        layer.bias_out.normal_()
    return layer


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 5, 4, 3), 1), ((2, 5), 1), ((3, 5, 7), 1), ((2, 6, 5), -1), ((4, 5), -1)]
)
def test_values(shape: tuple[int, ...], dim: int) -> None:
    layer, x = filled(5, dim), torch.randn(shape)
    axis = [1] * len(shape)
    axis[dim] = -1
    bias_in, slope, bias_out = (p.detach().numpy().reshape(axis) for p in (layer.bias_in, layer.slope, layer.bias_out))
    shifted = x.numpy() + bias_in
    expected = np.where(shifted > 0, shifted, shifted * slope) + bias_out
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [1, -1])
def test_gradients(dim: int) -> None:
    layer = filled(3, dim).double()
    x = torch.randn((2, 3, 4, 2) if dim == 1 else (2, 4, 3), dtype=torch.float64, requires_grad=True)
    parameters = (layer.bias_in, layer.slope, layer.bias_out)

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(("bias_in", "slope", "bias_out"), values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in parameters)))


def test_starts_as_a_leaky_relu_that_keeps_the_negative_side() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0]).reshape(1, 1, 4)
    assert RPReLU(1)(x).flatten().tolist() == [-0.5, 0.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("mean", "deviation"), [(0.0, 1.0), (0.7, -2.0), (-1.5, 0.5), (3.0, 0.1), (-3.0, 0.1), (2.0, 0.0)]
)
def test_centred_it_hands_on_a_mean_of_zero(mean: float, deviation: float) -> None:
    layer = RPReLU(1, slope=0.25)
    layer.centre(torch.tensor([mean]), torch.tensor([deviation]))
    # The mean over a fine grid of a normal distribution's quantiles.
    grid = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    x = (mean + abs(deviation) * grid).float().reshape(1, 1, -1)
    with torch.no_grad():
        y = layer(x)
    assert abs(y.double().mean().item()) < 1e-4
    assert y.std() <= x.std() * 1.0001


def test_bfloat16_and_channels_last() -> None:
    layer = filled(4)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    half = layer(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y.detach(), rtol=2e-2, atol=3e-2)


def test_errors_quote_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"dim=2 must be 1 \(channels first\) or -1 \(channels last\)"):
        RPReLU(3, dim=2)
    with pytest.raises(ValueError, match=r"has 4 channels on dimension 1 \(shape \(1, 4, 2, 2\)\), .* made for 3"):
        RPReLU(3)(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("dim", [1, -1])
def test_exported_it_gives_the_same_values_without_a_choice(dim: int) -> None:
    """Runtimes compute ``relu`` and ``prelu`` themselves, and few of them ``where``."""
    layer = filled(5, dim).eval()
    with torch.no_grad():
        layer.bias_in.zero_()
    x = torch.randn((2, 5, 7, 3) if dim == 1 else (2, 7, 5))
    x.flatten()[:5] = torch.tensor([0.0, -0.0, torch.inf, torch.nan, -1e-45])
    program = torch.export.export(layer, (x,))
    assert not any("where" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0, equal_nan=True)
