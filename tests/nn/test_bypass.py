"""Bypass: the geometry of every convolution, and its values against NumPy loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bidensify.nn import Bypass, fusion


def small(low: int, high: int) -> st.SearchStrategy[int | tuple[int, int]]:
    return st.one_of(st.integers(low, high), st.tuples(st.integers(low, high), st.integers(low, high)))


@settings(max_examples=150, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=small(1, 5),
    stride=small(1, 3),
    padding=st.one_of(small(0, 4), st.sampled_from(["same", "valid"])),
    dilation=small(1, 3),
    size=st.tuples(st.integers(13, 18), st.integers(13, 18)),
)
def test_geometry_of_convolutions(channels, kernel, stride, padding, dilation, size) -> None:  # type: ignore[no-untyped-def]
    if padding == "same":
        stride = 1
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation)
    bypass = Bypass(*channels, kernel, stride, padding, dilation)
    x = torch.randn(2, channels[0], *size)
    y = conv(x)
    z = bypass(x, y.shape[-2:])
    assert z.shape == y.shape
    assert z.isfinite().all()
    # A convex combination of the input never leaves its range.
    assert z.min() >= x.min() - 1e-5
    assert z.max() <= x.max() + 1e-5


@settings(max_examples=150, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=small(1, 5),
    stride=small(1, 3),
    padding=small(0, 2),
    extra=small(0, 2),
    dilation=small(1, 3),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
)
def test_geometry_of_transposed_convolutions(channels, kernel, stride, padding, extra, dilation, size) -> None:  # type: ignore[no-untyped-def]
    def both(v: int | tuple[int, int]) -> tuple[int, int]:
        return v if isinstance(v, tuple) else (v, v)

    # torch asks for output_padding below the stride or the dilation.
    bound = [max(s, d) - 1 for s, d in zip(both(stride), both(dilation))]
    extra = tuple(min(e, b) for e, b in zip(both(extra), bound))
    conv = nn.ConvTranspose2d(*channels, kernel, stride, padding, extra, dilation=dilation)
    x = torch.randn(2, channels[0], *size)
    y = conv(x)
    z = Bypass(*channels, kernel, stride, padding, dilation, transposed=True)(x, y.shape[-2:])
    assert z.shape == y.shape
    assert z.min() >= x.min() - 1e-5
    assert z.max() <= x.max() + 1e-5


def average_loop(x: np.ndarray, kernel: int, stride: int, padding: int, out: tuple[int, int]) -> np.ndarray:
    n, c, h, w = x.shape
    y = np.zeros((n, c, *out))
    for i in range(out[0]):
        for j in range(out[1]):
            top, left = i * stride - padding, j * stride - padding
            window = x[:, :, max(top, 0) : min(top + kernel, h), max(left, 0) : min(left + kernel, w)]
            y[:, :, i, j] = window.mean((2, 3))
    return y


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (3, 2, 1, (9, 12)),
        (2, 2, 0, (8, 7)),
        (1, 2, 0, (7, 8)),
        (4, 4, 0, (16, 18)),
        (7, 2, 3, (12, 9)),
        (5, 3, 2, (11, 14)),
    ],
)
def test_strided_windows_average_without_padding(kernel: int, stride: int, padding: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    out = nn.Conv2d(3, 3, kernel, stride, padding).double()(x).shape[-2:]
    y = Bypass(3, 3, kernel, stride, padding)(x, out)
    np.testing.assert_allclose(y.numpy(), average_loop(x.numpy(), kernel, stride, padding, tuple(out)), atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"),
    [(1, 0, 1), (3, 1, 1), (5, 2, 1), (3, 4, 4), (3, "same", 2), (4, "same", 1), ((1, 7), (0, 3), 1)],
)
def test_same_size_is_the_identity(kernel, padding, dilation) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(1, 4, 9, 11)
    out = nn.Conv2d(4, 4, kernel, 1, padding, dilation)(x).shape[-2:]
    assert Bypass(4, 4, kernel, 1, padding, dilation)(x, out) is x


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (3, 1, 0, 1),
        (5, 1, 0, 1),
        (3, 1, "valid", 2),
        (5, 1, 1, 1),
        (3, 2, 2, 2),
        (3, 2, 0, 3),
        (1, 1, 2, 1),
        (3, 1, 3, 1),
    ],
)
def test_other_windows_give_their_centre(kernel, stride, padding, dilation) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 2, 14, 12)
    out = nn.Conv2d(2, 2, kernel, stride, padding, dilation)(x).shape[-2:]
    y = Bypass(2, 2, kernel, stride, padding, dilation)(x, out)
    pad = 0 if padding == "valid" else padding
    for i in range(out[0]):
        for j in range(out[1]):
            row = i * stride - pad + dilation * (kernel - 1) // 2
            column = j * stride - pad + dilation * (kernel - 1) // 2
            expected = x[:, :, min(max(row, 0), 13), min(max(column, 0), 11)]
            assert torch.equal(y[:, :, i, j], expected), (i, j)


@pytest.mark.parametrize(
    ("length", "kernel", "centres"), [(8, 5, [1, 3, 5, 7]), (9, 3, [0, 2, 4, 6, 8]), (8, 3, [1, 3, 5, 7])]
)
def test_padding_from_the_inputs_size_is_split_as_the_layer_splits_it(
    length: int, kernel: int, centres: list[int]
) -> None:
    """TensorFlow's "SAME" with stride 2: H' = ceil(H / 2), the smaller half of the padding first."""
    x = torch.arange(float(length)).view(1, 1, length, 1).expand(1, 1, length, length)
    y = Bypass(1, 1, kernel, 2, 0)(x, (len(centres), len(centres)))
    assert y[0, 0, :, 0].tolist() == centres


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_a_kernel_centred_on_its_stride_is_nearest_upsampling(factor: int, pad: int) -> None:
    x = torch.randn(2, 3, 4, 5)
    y = Bypass(3, 3, factor + 2 * pad, factor, pad, transposed=True)(x, (4 * factor, 5 * factor))
    assert torch.equal(y, x.repeat_interleave(factor, 2).repeat_interleave(factor, 3))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra"), [(4, 2, 1, 0), (3, 2, 1, 1), (5, 2, 2, 1), (3, 1, 1, 0)]
)
def test_transposed_positions_come_from_an_input_that_feeds_them(
    kernel: int, stride: int, padding: int, extra: int
) -> None:
    length = 6
    x = torch.arange(float(length)).reshape(1, 1, length, 1).expand(1, 1, length, length).contiguous()
    out = nn.ConvTranspose2d(1, 1, kernel, stride, padding, extra)(x).shape[-2:]
    y = Bypass(1, 1, kernel, stride, padding, transposed=True)(x, out)
    for o in range(out[0]):
        feeding = [i for i in range(length) if 0 <= o + padding - i * stride < kernel]
        if feeding:
            assert int(y[0, 0, o, 0]) in feeding, o


def test_tokens_go_through_fusion_alone() -> None:
    x = torch.randn(2, 7, 6)
    assert torch.equal(Bypass(6, 9, dim=-1)(x), fusion(x, 9, dim=-1))
    assert torch.equal(Bypass(6, 4, dim=-1)(x), fusion(x, 4, dim=-1))


def test_channels_and_space_together_in_both_layouts() -> None:
    for channels in ((4, 6), (6, 4), (4, 8), (8, 4)):
        x = torch.randn(2, channels[0], 8, 8, requires_grad=True)
        bypass = Bypass(*channels, 3, 2, 1)
        y = bypass(x, (4, 4))
        torch.testing.assert_close(
            y, nn.functional.avg_pool2d(fusion(x, channels[1]), 3, 2, 1, count_include_pad=False)
        )
        last = bypass(x.detach().contiguous(memory_format=torch.channels_last), (4, 4))
        torch.testing.assert_close(last, y.detach())
        assert last.is_contiguous(memory_format=torch.channels_last)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert not list(bypass.parameters())
    assert not list(bypass.buffers())


def test_errors_quote_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"padding='reflect' must be 'same', 'valid' or integers"):
        Bypass(3, 3, 3, 1, "reflect")
    with pytest.raises(ValueError, match=r"kernel_size=\(1, 2, 3\) must be one integer or two"):
        Bypass(3, 3, (1, 2, 3))
    with pytest.raises(ValueError, match=r"has 4 channels on dimension 1 \(shape \(1, 4, 2, 2\)\), .* made for 3"):
        Bypass(3, 3)(torch.zeros(1, 4, 2, 2), (2, 2))
