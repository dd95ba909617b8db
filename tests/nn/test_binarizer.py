"""DAB and the sign binarizer against straight autograd formulations."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from bidensify.nn import DistributionAdaptiveBinarizer, SignBinarizer

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
assert _spec is not None
assert _spec.loader is not None
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

SCALES = ["per_tensor", "per_channel", "none"]


def filled(channels: int, act_scale: str, dim: int = 1) -> DistributionAdaptiveBinarizer:
    layer = DistributionAdaptiveBinarizer(channels, act_scale, dim)
    with torch.no_grad():
        layer.k.normal_()
        layer.b.normal_(std=0.2)
        layer.a.fill_(0.7)
    return layer


def gradients(output: torch.Tensor, weight: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True))


@pytest.mark.parametrize("act_scale", SCALES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 5, 6, 4), 1), ((2, 5, 7), 1), ((2, 9, 5), -1), ((2, 3, 4, 5), -1), ((4, 5), -1), ((4, 5), 1)],
)
def test_values_and_gradients_in_float64(act_scale: str, shape: tuple[int, ...], dim: int) -> None:
    layer = filled(5, act_scale, dim).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    k, b = layer.k, layer.b
    if dim == 1:
        k, b = (p.reshape(1, 5, *([1] * (len(shape) - 2))) for p in (k, b))
    theirs = plain.dab(x, k, b, layer.a, act_scale, dim)
    ours = layer(x)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(x)
    inputs = [x, layer.k, layer.b] + ([layer.a] if act_scale != "none" else [])
    for got, want in zip(gradients(ours, weight, inputs), gradients(theirs, weight, inputs)):
        assert got is not None
        assert want is not None
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("act_scale", SCALES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 5, 8, 6), (3, 16, 17, 13), (1, 33, 40, 40), (2, 1, 5, 5), (2, 7, 1, 1)])
def test_values_and_gradients_in_float32(act_scale: str, layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    layer = filled(shape[1], act_scale)
    x = (torch.randn(shape) * 1.5).contiguous(memory_format=layout).requires_grad_()
    double = [p.detach().double().requires_grad_() for p in (x, layer.k, layer.b, layer.a)]
    theirs = plain.dab(*double, act_scale)
    ours = layer(x)
    assert ours.stride() == x.stride()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(x)
    got = gradients(ours, weight, [x, layer.k, layer.b] + ([layer.a] if act_scale != "none" else []))
    want = gradients(theirs, weight.double(), double[: len(got)])
    assert got[0] is not None
    assert got[0].stride() == x.stride()
    for g, w in zip(got, want):
        assert g is not None
        assert w is not None
        torch.testing.assert_close(g.double(), w, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("act_scale", SCALES)
def test_codes_are_what_forward_gives(act_scale: str) -> None:
    layer = filled(6, act_scale)
    for x in (torch.randn(2, 6, 9, 7), torch.randn(2, 6, 9, 7).contiguous(memory_format=torch.channels_last)):
        beta, low, high = layer.codes(x)
        with torch.no_grad():
            assert torch.equal(torch.where(x >= beta, high, low).expand_as(x), layer(x))


@pytest.mark.parametrize("planes", [1, 2])
def test_the_scale_without_kernels_is_as_exact_as_with_them(planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a ReLU many values are equal, and a step that is off by 1e-5 turns all of them at once."""
    torch.manual_seed(0)
    dab = DistributionAdaptiveBinarizer(32, planes=planes)
    x = torch.randn(2, 32, 64, 64).relu().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        kernels = dab.codes(x)[2]
        monkeypatch.setattr(DistributionAdaptiveBinarizer, "native", lambda self, x: False)
        plain, exact = dab.codes(x)[2], dab.double().codes(x.double())[2]
    torch.testing.assert_close(plain.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(kernels.double(), exact, rtol=1e-6, atol=0)


def test_statistics_are_per_sample() -> None:
    layer = filled(4, "per_tensor")
    x = torch.randn(5, 4, 12, 10)
    together = layer(x)
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], layer(x[i : i + 1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ste", ["polynomial", "clipped"])
def test_sign_binarizer(ste: str) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    ours = SignBinarizer(3, ste=ste)(x)
    theirs = (plain.bireal if ste == "polynomial" else plain.clipped)(x)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(x)
    got, want = gradients(ours, weight, [x]), gradients(theirs, weight, [x])
    assert got[0] is not None
    assert want[0] is not None
    torch.testing.assert_close(got[0], want[0])


def test_each_calibration_batch_weighs_the_same() -> None:
    """Also where there are too many samples to keep: the threshold lies in the middle of all batches, not of the last."""
    binarizer = DistributionAdaptiveBinarizer(2)
    with torch.no_grad():
        binarizer.k.zero_()
    binarizer.begin_calibration()
    for number in range(64):
        binarizer(torch.full((4, 2, 16, 16), float(number)))
    binarizer.end_calibration()
    assert (binarizer.b - 31.5).abs().max() <= 2


def test_disabled_passes_the_input_through() -> None:
    layer = filled(3, "per_tensor")
    layer.enabled = False
    x = torch.randn(1, 3, 4, 4)
    assert layer(x) is x


@pytest.mark.parametrize("act_scale", SCALES)
def test_bfloat16(act_scale: str) -> None:
    layer = filled(8, act_scale)
    x = torch.randn(2, 8, 10, 10).bfloat16()
    leaf = x.clone().requires_grad_()
    ours = layer(leaf)
    assert ours.dtype == torch.bfloat16
    double = [p.detach().double().requires_grad_() for p in (x, layer.k, layer.b, layer.a)]
    theirs = plain.dab(*double, act_scale)
    assert (ours.sign() == theirs.sign()).float().mean() > 0.99
    torch.testing.assert_close(ours.abs().double(), theirs.abs(), rtol=1e-2, atol=1e-2)
    weight = torch.randn_like(x)
    got = gradients(ours, weight, [leaf, layer.k, layer.b])
    want = gradients(theirs, weight.double(), double[:3])
    for g, w in zip(got, want):
        assert g is not None
        assert w is not None
        torch.testing.assert_close(g.double(), w, rtol=5e-2, atol=0.15)


def test_packable_says_why_not() -> None:
    assert filled(2, "per_tensor").packable
    assert filled(2, "none").unpackable_reason == ""
    refused = filled(2, "per_channel")
    assert not refused.packable
    assert 'act_scale="per_channel"' in refused.unpackable_reason


def test_errors_quote_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"act_scale='per_row' must be 'per_tensor', 'per_channel' or 'none'"):
        DistributionAdaptiveBinarizer(3, "per_row")
    with pytest.raises(ValueError, match=r"dim=3 must be 1 \(channels first\) or -1 \(channels last\)"):
        SignBinarizer(3, dim=3)
    with pytest.raises(ValueError, match=r"has shape \(3,\); statistics are per sample, so give a batch"):
        DistributionAdaptiveBinarizer(3, dim=-1)(torch.zeros(3))
    with pytest.raises(ValueError, match=r"has 4 channels on dimension 1 \(shape \(1, 4, 2, 2\)\), .* made for 3"):
        DistributionAdaptiveBinarizer(3)(torch.zeros(1, 4, 2, 2))
