"""Every kernel of this machine against torch's float convolution of -1 and +1, and against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bidensify.deploy.backends import KERNEL_VARIABLE, available_kernels, choose_backend
from bidensify.deploy.bits import bits_from_signs, tiles_from_bits
from bidensify.deploy.reference import packed_reference
from bidensify.deploy.spec import PackedSpec
from bidensify.errors import ConfigError
from bidensify.nn.bypass import fusion

NATIVE = [name for name in available_kernels() if name != "reference"]

pytestmark = pytest.mark.skipif(not NATIVE, reason="the kernels were not built here (no compiler)")


@st.composite
def layers(draw: st.DrawFn) -> tuple[PackedSpec, tuple[int, int, int, int]]:
    """A geometry, and the shape of an input that it takes."""
    kind = draw(st.sampled_from(["conv", "conv", "depthwise", "conv_transpose", "pointwise", "linear"]))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = st.sampled_from([1, 3, 16, 20, 24, 31, 32, 33, 48, 60, 64, 65, 66, 72, 93, 96])
    cin, cout = groups * draw(channels), groups * draw(channels)
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    pads = (draw(st.integers(0, 4)), draw(st.integers(0, 4)), draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    size = (draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 40)))
    if kind == "pointwise":
        spec = PackedSpec("conv", cin, cout, groups=groups)
    elif kind == "linear":
        spec = PackedSpec("linear", cin, cout)
    elif kind == "depthwise":
        channel = draw(st.sampled_from([2, 16, 33, 64, 70]))
        spec = PackedSpec("conv", channel, channel, kernel, stride, pads, dilation, channel)
    elif kind == "conv_transpose":
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        spec = PackedSpec(
            kind, cin, cout, kernel, stride, pads[:2] * 2, dilation, groups, output_padding=(extra[0], extra[1])
        )
    else:
        spec = PackedSpec("conv", cin, cout, kernel, stride, pads, dilation, groups)
    height, width = size[1:]
    # Grown until the output has a pixel.
    while min(spec.output_size(height, width)) < 1:
        height, width = height + 3, width + 3
    return spec, (size[0], spec.in_channels, height, width)


def random_signs(shape: Any, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator) * 2.0 - 1


def float_convolution(x: Tensor, signs: Tensor, spec: PackedSpec) -> Tensor:
    """torch's own layer in float64, from the packed order of weights."""
    x, signs = x.double(), signs.double()
    top, left, bottom, right = spec.padding
    if spec.kind == "linear":
        return F.linear(x.permute(0, 2, 3, 1), signs.flatten(1)).permute(0, 3, 1, 2)
    if spec.kind == "conv_transpose":
        weight = torch.cat([part.transpose(0, 1) for part in signs.chunk(spec.groups)])
        return F.conv_transpose2d(
            x, weight, None, spec.stride, (top, left), spec.output_padding, spec.groups, spec.dilation
        )
    return F.conv2d(F.pad(x, (left, right, top, bottom)), signs, None, spec.stride, 0, spec.dilation, spec.groups)


@settings(max_examples=150, deadline=None)
@given(layers(), st.integers(0, 2**31))
def test_integer_dot_products_are_exact(case: tuple[PackedSpec, tuple[int, int, int, int]], seed: int) -> None:
    spec, shape = case
    generator = torch.Generator().manual_seed(seed)
    signs, x = random_signs(spec.weight_shape, generator), random_signs(shape, generator)
    tiles = tiles_from_bits(bits_from_signs(signs), spec)
    want = float_convolution(x, signs, spec)
    side = torch.zeros(spec.side_length)
    for name in NATIVE:
        got = choose_backend(name).run(x, tiles, side, spec, None, None, None, dots=True)
        assert torch.equal(got.double(), want), name


@settings(max_examples=150, deadline=None)
@given(layers(), st.integers(0, 2**31), st.data())
def test_layers_agree_with_the_reference_and_each_other(
    case: tuple[PackedSpec, tuple[int, int, int, int]], seed: int, data: st.DataObject
) -> None:
    spec, shape = case
    flag = st.booleans()
    scale = data.draw(st.sampled_from(["alpha", "levels", "given", "none"]))
    spec = replace(
        spec,
        mean_threshold=data.draw(flag),
        shift=data.draw(flag),
        alpha=scale == "alpha",
        levels=scale == "levels",
        bypass=data.draw(flag),
        bypass_padding=spec.padding[:2],
        slope=data.draw(flag),
        post=data.draw(flag),
        offset=data.draw(flag),
        clamp=data.draw(flag),
        bypass_last=data.draw(flag),
        planes=data.draw(st.sampled_from([1, 2])),
    )
    spec = replace(spec, rise=spec.slope and data.draw(flag))
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    x = torch.randn(shape, generator=generator).to(dtype)
    if data.draw(st.integers(0, 4)) == 0:
        # On one side of its threshold, mostly: planes that are constant.
        x = x.abs() + data.draw(st.sampled_from([0, 5]))
    if data.draw(flag):
        x = x.contiguous(memory_format=torch.channels_last)
    tiles = tiles_from_bits(bits_from_signs(random_signs(spec.weight_shape, generator)), spec)
    side = torch.randn(spec.side_length, generator=generator) / 2
    if spec.clamp:
        start = spec.layout["clamp"][0]
        side[start : start + 2] = side[start : start + 2].sort().values
    levels = torch.randn((shape[0], 2), generator=generator) if scale == "given" else None
    thresholds = torch.randn(shape[:2], generator=generator) if data.draw(flag) and not spec.mean_threshold else None
    size = spec.output_size(*shape[2:])
    residual = torch.randn((shape[0], spec.out_channels, *size), generator=generator) if data.draw(flag) else None
    if residual is not None:
        residual = residual.to(dtype)
    want = packed_reference(x, tiles, side, spec, thresholds, levels, residual).float()
    first = None
    for name in NATIVE:
        got = choose_backend(name).run(x, tiles, side, spec, thresholds, levels, residual)
        assert got.dtype == dtype
        error = (got.float() - want).abs().max() / want.abs().max().clamp(min=1e-6)
        assert error <= (1e-5 if dtype == torch.float32 else 1e-2), name
        first = got if first is None else first
        # The sums run in one order everywhere.
        assert torch.equal(got, first), name


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("cin", "cout"),
    [
        (17, 34),
        (20, 60),
        (24, 72),
        (31, 93),
        (40, 240),
        (23, 23),
        (24, 8),
        (75, 25),
        (40, 56),
        (5, 20),
        (20, 5),
        (1, 19),
    ],
)
def test_copies_and_means_of_channels_that_no_vector_divides(
    name: str, dtype: torch.dtype, groups: int, cin: int, cout: int
) -> None:
    """The bypass alone, of whole numbers: a channel in the wrong lane is another number."""
    spec = PackedSpec("conv", groups * cin, groups * cout, (3, 3), padding=(1, 1, 1, 1), groups=groups, bypass=True)
    tiles = tiles_from_bits(bits_from_signs(random_signs(spec.weight_shape, torch.Generator().manual_seed(0))), spec)
    x = torch.arange(7.0 * 9 * groups * cin).remainder(251).sub(125).view(1, 7, 9, -1).permute(0, 3, 1, 2)
    x = x.to(dtype)
    got = choose_backend(name).run(x, tiles, torch.zeros(spec.side_length), spec, None, None, None)
    want = fusion(x.double(), spec.out_channels, dim=1).to(dtype)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", NATIVE)
def test_the_number_of_threads_does_not_change_a_bit(name: str) -> None:
    spec = PackedSpec("conv", 40, 72, (3, 3), padding=(1, 1, 1, 1), mean_threshold=True, shift=True, alpha=True, bypass=True,
                     bypass_padding=(1, 1), slope=True, post=True)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    tiles = tiles_from_bits(bits_from_signs(random_signs(spec.weight_shape, generator)), spec)
    side = torch.randn(spec.side_length, generator=generator)
    x = torch.randn((3, 40, 33, 29), generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(choose_backend(name).run(x, tiles, side, spec, None, None, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", NATIVE)
def test_sign_of_zero_and_of_nan(name: str) -> None:
    spec = PackedSpec("conv", 3, 1)
    tiles = tiles_from_bits(bits_from_signs(torch.ones(spec.weight_shape)), spec)
    x = torch.tensor([0.0, -0.0, float("nan")]).view(1, 3, 1, 1)
    dots = choose_backend(name).run(x, tiles, torch.zeros(spec.side_length), spec, None, None, None, dots=True)
    # sign(0) = sign(-0) = +1; a NaN is on no side and counts as low, as torch.where(x >= beta, ...) has it.
    assert dots.item() == 1


@pytest.mark.parametrize("name", NATIVE)
def test_both_planes_of_values_on_thresholds_and_of_nan(name: str) -> None:
    spec = PackedSpec("conv", 1, 1, levels=True, planes=2)
    tiles = tiles_from_bits(bits_from_signs(torch.ones(spec.weight_shape)), spec)
    side = torch.zeros(spec.side_length)
    side[:2] = torch.tensor([-1.0, 1.0])  # thresholds -1, 0, 1
    below = [float(np.nextafter(np.float32(at), np.float32(-9))) for at in (-1, 0, 1)]
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, *below, 9.0, -9.0, float("inf"), -float("inf"), float("nan")]).view(
        1, 1, 1, -1
    )
    dots = choose_backend(name).run(x, tiles, side, spec, None, None, None, dots=True)
    assert dots.flatten().tolist() == [-1, 1, 1, 3, -3, -1, 1, 3, -3, 3, -3, -3]


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 2.5), (1.5, 2.5), (0.25, 0.5), (-2.5, -1.5), (-0.5, 1.5), (-2.0, 0.5), (2.0, 2.0)]
)
@pytest.mark.parametrize("geometry", ["3x3", "groups", "1x1", "strided", "depthwise", "transposed"])
def test_planes_that_are_constant(name: str, low: float, high: float, geometry: str) -> None:
    # With the step 1, values of (0.5, 2.5) leave the first plane constant, of (-0.5, 1.5) the second, of (1.5, 2.5) both.
    spec = {
        "3x3": PackedSpec("conv", 40, 70, (3, 3), padding=(1, 1, 1, 1)),
        "groups": PackedSpec("conv", 66, 99, (3, 2), padding=(1, 1, 1, 1), groups=3),
        "1x1": PackedSpec("conv", 70, 40),
        "strided": PackedSpec("conv", 32, 64, (3, 3), (2, 2), (1, 1, 1, 1), (2, 1)),
        "depthwise": PackedSpec("conv", 35, 35, (3, 3), padding=(1, 1, 1, 1), groups=35),
        "transposed": PackedSpec("conv_transpose", 33, 20, (3, 3), (2, 2), (1, 1, 1, 1)),
    }[geometry]
    spec = replace(spec, planes=2, offset=True, levels=True)
    generator = torch.Generator().manual_seed(5)
    signs = random_signs(spec.weight_shape, generator)
    tiles = tiles_from_bits(bits_from_signs(signs), spec)
    side = torch.randn(spec.side_length, generator=generator)
    side[:2] = torch.tensor([-1.0, 1.0])
    # The second sample has every value: a plane is constant of one sample, not of another.
    x = torch.where(torch.rand((2, spec.in_channels, 9, 11), generator=generator) < 0.5, low, high)
    x[1] = torch.randn(x[1].shape, generator=generator) * 2
    levels = (x >= 0) * 2 + torch.where(x >= 0, x >= 1, x >= -1) * 1 - 1.5
    dots = choose_backend(name).run(x, tiles, side, spec, None, None, None, dots=True)
    assert torch.equal(dots.double(), float_convolution(levels * 2, signs, spec))
    assert torch.equal(choose_backend(name).run(x, tiles, side, spec), packed_reference(x, tiles, side, spec))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("constant", [False, True])
def test_long_sums_of_two_planes_do_not_overflow_narrow_counters(name: str, constant: bool) -> None:
    spec = PackedSpec("linear", 70_001, 33, levels=True, planes=2)
    tiles = tiles_from_bits(bits_from_signs(torch.ones(spec.weight_shape)), spec)
    side = torch.zeros(spec.side_length)
    side[:2] = torch.tensor([-1.0, 1.0])
    x = torch.full((1, spec.in_channels, 3, 1), -9.0)
    if not constant:
        x[:, 0, 2] = 9.0
    dots = choose_backend(name).run(x, tiles, side, spec, None, None, None, dots=True)
    assert dots[:, :, :2].unique().tolist() == [-3 * 70_001]
    assert dots[:, :, 2].unique().tolist() == [-3 * 70_001 + (0 if constant else 6)]


@pytest.mark.parametrize("name", NATIVE)
def test_long_sums_do_not_overflow_narrow_counters(name: str) -> None:
    spec = PackedSpec("linear", 70_001, 33)
    signs = torch.ones(spec.weight_shape)
    tiles = tiles_from_bits(bits_from_signs(signs), spec)
    x = -torch.ones((1, spec.in_channels, 2, 1))
    dots = choose_backend(name).run(x, tiles, torch.zeros(spec.side_length), spec, None, None, None, dots=True)
    assert dots.unique().tolist() == [-70_001]


@pytest.mark.parametrize("name", NATIVE)
def test_large_depthwise_kernels_count_past_a_byte(name: str) -> None:
    spec = PackedSpec("conv", 33, 33, (17, 19), padding=(8, 9, 8, 9), groups=33)
    signs = torch.ones(spec.weight_shape)
    tiles = tiles_from_bits(bits_from_signs(signs), spec)
    x = -torch.ones((1, 33, 20, 21))
    dots = choose_backend(name).run(x, tiles, torch.zeros(spec.side_length), spec, None, None, None, dots=True)
    assert torch.equal(dots.double(), float_convolution(x, signs, spec))


def test_arguments_that_do_not_fit_never_reach_the_kernel() -> None:
    spec = PackedSpec("conv", 8, 8, (3, 3), mean_threshold=True)
    backend = choose_backend(NATIVE[0])
    x, tiles, side = (
        torch.zeros(1, 8, 5, 5),
        torch.zeros(spec.tiles_shape, dtype=torch.int32),
        torch.zeros(spec.side_length),
    )

    def run(x: Tensor = x, tiles: Tensor = tiles, side: Tensor = side, levels: Tensor | None = None) -> Tensor:
        return backend.run(x, tiles, side, spec, None, levels, None)

    run()
    with pytest.raises(ConfigError, match="tiles"):
        run(tiles=tiles[..., :8])
    with pytest.raises(ConfigError, match="side"):
        run(side=side[:-1])
    with pytest.raises(ConfigError, match="side"):
        run(side=side.double())
    with pytest.raises(ConfigError, match="x of shape"):
        run(x=torch.zeros(1, 7, 5, 5))
    with pytest.raises(ConfigError, match="larger input"):
        run(x=torch.zeros(1, 8, 2, 5))
    with pytest.raises(ConfigError, match="levels"):
        run(levels=torch.zeros(2, 2))


def test_a_kernel_that_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = next(name for name in ("neon", "avx2") if name not in NATIVE)
    with pytest.raises(ConfigError, match=missing):
        choose_backend(missing)
    monkeypatch.setenv(KERNEL_VARIABLE, "portable")
    assert choose_backend("auto").name == "portable"
    assert choose_backend("reference").run is None
    monkeypatch.setenv(KERNEL_VARIABLE, "reference")
    assert choose_backend("auto").run is None
    monkeypatch.setenv(KERNEL_VARIABLE, "fastest")
    with pytest.raises(ConfigError, match="BIDENSIFY_KERNEL='fastest'"):
        choose_backend("auto")


def test_an_empty_batch_gives_an_empty_result() -> None:
    spec = PackedSpec("conv", 8, 8, (3, 3))
    tiles = torch.zeros(spec.tiles_shape, dtype=torch.int32)
    y = choose_backend(NATIVE[0]).run(
        torch.zeros(0, 8, 5, 5), tiles, torch.zeros(spec.side_length), spec, None, None, None
    )
    assert y.shape == (0, 8, 3, 3)
