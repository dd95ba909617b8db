"""Thresholds, turned channels and surrogates that methods are built of."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bidensify.nn import WeightBinarizer, straight_through
from bidensify.nn.signs import crossing

numbers = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=300, deadline=None)
@given(k=numbers, b=numbers, away=st.integers(-3, 3))
@example(k=0.0, b=0.0, away=0)
@example(k=0.0, b=-0.0, away=0)
@example(k=0.0, b=-1.0, away=1)
@example(k=-1.0, b=0.5, away=0)
@example(k=-1e-38, b=3e38, away=0)
@example(k=3.0, b=-1.0, away=0)
def test_a_crossing_is_where_the_exact_sign_changes(k: float, b: float, away: int) -> None:
    threshold, flip = crossing(torch.tensor([k]), torch.tensor([b]))
    x = threshold
    for _ in range(abs(away)):
        x = torch.nextafter(x, torch.full_like(x, torch.inf if away > 0 else -torch.inf))
    x = x.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
    value = Fraction(torch.tensor(k).item()) * Fraction(x.item()) + Fraction(torch.tensor(b).item())
    assert bool(torch.isfinite(threshold))
    assert float(torch.where(x >= threshold, flip, -flip)) == (1.0 if value >= 0 else -1.0)


def test_straight_through_gives_the_value_to_the_bit_and_the_others_gradient() -> None:
    x = (torch.randn(1000) * 1e3).requires_grad_()
    value = (torch.rand(1000) * 1e-3).requires_grad_()
    y = straight_through(value, torch.tanh(x) * 3)
    assert torch.equal(y.detach(), value.detach())
    y.sum().backward()
    torch.testing.assert_close(x.grad, 3 * (1 - torch.tanh(x.detach()) ** 2))
    assert value.grad is None


@pytest.mark.parametrize("transposed", [False, True])
def test_moments_are_those_of_each_output_channel_where_its_weights_differ(transposed: bool) -> None:
    weight = torch.randn(6, 4, 3, 2, dtype=torch.float64)
    channels = [weight[g * 3 : g * 3 + 3, o] for g in range(2) for o in range(4)] if transposed else list(weight)
    binarizer = WeightBinarizer(transposed=transposed, groups=2 if transposed else 1)
    for correction in (0, 1):
        mean, deviation, differ = binarizer.moments(weight, correction)
        torch.testing.assert_close(mean, torch.stack([c.mean() for c in channels]))
        torch.testing.assert_close(deviation, torch.stack([c.std(correction=correction) for c in channels]))
        assert bool(differ.all())
    equal = torch.full((3, 5), 0.1).requires_grad_()
    mean, deviation, differ = WeightBinarizer().moments(equal, 1)
    assert (mean.tolist(), deviation.tolist(), differ.tolist()) == ([0] * 3, [1] * 3, [False] * 3)
    (mean + deviation).sum().backward()
    assert torch.equal(equal.grad, torch.zeros(3, 5))
