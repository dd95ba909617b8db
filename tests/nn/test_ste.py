"""Signs and their estimators against straight autograd formulations in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from bidensify.nn import (
    BiDenseConv2d,
    DistributionAdaptiveBinarizer,
    SignBinarizer,
    WeightBinarizer,
    binarize_weight,
    clipped_sign,
    polynomial_sign,
    sign,
    threshold_sign,
)

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
assert _spec is not None
assert _spec.loader is not None
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

EDGES = [-3.0, -1.0, -0.9999, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.25, 0.9999, 1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_is_positive_everywhere(dtype: torch.dtype) -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    ones = torch.ones(2, dtype=dtype)
    assert torch.equal(sign(zeros), ones)
    assert torch.equal(polynomial_sign(zeros), ones)
    assert torch.equal(clipped_sign(zeros), ones)
    assert torch.equal(binarize_weight(zeros, ones[:1]), ones)
    # x == beta is the zero of a shifted input, whichever signs the zeros have.
    for beta in (0.0, -0.0, 0.5, -0.5):
        x = torch.tensor([beta, beta], dtype=dtype)
        assert torch.equal(threshold_sign(x, torch.tensor(beta, dtype=dtype), ones[:1]), ones)
        assert torch.equal(threshold_sign(-zeros + beta, torch.tensor(beta, dtype=dtype), ones[:1]), ones)
    image = torch.zeros(1, 2, 3, 3, dtype=dtype)
    for x in (image, -image):
        assert (SignBinarizer(2)(x) == 1).all()
        binarizer = DistributionAdaptiveBinarizer(2).to(dtype)
        assert (binarizer(x) > 0).all()
        beta, low, high = binarizer.codes(x)
        assert torch.equal(torch.where(x >= beta, high, low).expand_as(x), binarizer(x))
    layer = BiDenseConv2d(2, 2, 1)
    with torch.no_grad():
        layer.latent_weight.copy_(torch.tensor([[0.0, -0.0], [-0.0, 1.0]]).reshape(2, 2, 1, 1))
    assert (layer.weight >= 0).all()
    assert (layer.binary_weight()[0] == 1).all()


def test_nothing_is_ever_zero() -> None:
    x = torch.randn(10_000)
    x[::3] = 0
    assert set(sign(x).unique().tolist()) == {-1.0, 1.0}
    assert set(polynomial_sign(x).unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("polynomial", [True, False])
def test_threshold_sign_gradients(polynomial: bool) -> None:
    reference = plain.bireal if polynomial else plain.clipped
    for shape in ((), (1, 3, 1, 1), (4, 3, 1, 1), (4, 1, 1, 1)):
        torch.manual_seed(len(shape))
        x = torch.randn(4, 3, 6, 5, dtype=torch.float64, requires_grad=True)
        beta = (torch.randn(shape, dtype=torch.float64) * 0.3).requires_grad_()
        alpha = torch.rand(shape, dtype=torch.float64).add(0.5).requires_grad_()
        weight = torch.randn_like(x)
        ours = threshold_sign(x, beta, alpha, ste="polynomial" if polynomial else "clipped")
        theirs = alpha * reference(x - beta)
        torch.testing.assert_close(ours, theirs)
        got = torch.autograd.grad((ours * weight).sum(), (x, beta, alpha))
        want = torch.autograd.grad((theirs * weight).sum(), (x, beta, alpha))
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w)


def test_windows_at_their_edges() -> None:
    x = torch.tensor(EDGES, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(polynomial_sign(x).sum(), x)
    np.testing.assert_allclose(gradient.numpy(), [2 * max(0.0, 1 - abs(v)) for v in EDGES], atol=1e-12)
    (gradient,) = torch.autograd.grad(clipped_sign(x).sum(), x)
    assert gradient.tolist() == [float(abs(v) <= 1) for v in EDGES]
    (gradient,) = torch.autograd.grad(binarize_weight(x, torch.tensor(0.5, dtype=torch.float64)).sum(), x)
    assert gradient.tolist() == [0.5 * float(abs(v) <= 1) for v in EDGES]


def scale_loop(weight: np.ndarray, transposed: bool, groups: int) -> np.ndarray:
    """mean |w| over all that feeds each output channel, one weight at a time."""
    if not transposed:
        return np.array([np.mean([abs(v) for v in row.flatten()]) for row in weight])
    in_per_group, out_per_group = weight.shape[0] // groups, weight.shape[1]
    scales = []
    for o in range(out_per_group * groups):
        group, inside = divmod(o, out_per_group)
        rows = weight[group * in_per_group : (group + 1) * in_per_group, inside]
        scales.append(np.mean([abs(v) for v in rows.flatten()]))
    return np.array(scales)


@pytest.mark.parametrize(
    ("shape", "transposed", "groups"),
    [
        ((6, 4, 3, 3), False, 1),
        ((6, 2, 3, 1), False, 3),
        ((5, 7), False, 1),
        ((4, 6, 3, 2), True, 1),
        ((4, 3, 2, 2), True, 2),
        ((6, 1, 3, 3), True, 6),
        ((6, 2, 4, 4), True, 3),
    ],
)
def test_weight_scale_is_per_output_channel(shape: tuple[int, ...], transposed: bool, groups: int) -> None:
    weight = torch.randn(shape, requires_grad=True)
    binarizer = WeightBinarizer(transposed=transposed, groups=groups)
    expected = scale_loop(weight.detach().numpy(), transposed, groups)
    channel_scale = binarizer.channel_scale(weight)
    np.testing.assert_allclose(channel_scale.numpy(), expected, rtol=1e-6)
    binary = binarizer(weight).detach().numpy()
    for index in np.ndindex(*shape):
        if transposed:
            o = index[0] // (shape[0] // groups) * shape[1] + index[1]
        else:
            o = index[0]
        value = expected[o] if weight[index] >= 0 else -expected[o]
        np.testing.assert_allclose(binary[index], value, rtol=1e-6)
    # The scale takes no gradient: the weight's own is the estimator's alone.
    upstream = torch.randn(shape)
    (gradient,) = torch.autograd.grad((binarizer(weight) * upstream).sum(), weight)
    window = (weight.detach().abs() <= 1).float()
    torch.testing.assert_close(gradient, upstream * window * binarizer.like(binarizer.channel_scale(weight), weight))


def test_unscaled_weights_are_plain_signs() -> None:
    weight = torch.randn(3, 2, 3, 3)
    binarizer = WeightBinarizer(scaled=False)
    assert torch.equal(binarizer(weight), sign(weight))
    assert torch.equal(binarizer.channel_scale(weight), torch.ones(len(binarizer.rows(weight))))
