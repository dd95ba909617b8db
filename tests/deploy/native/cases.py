"""Random layers with their inputs and the reference path's results, in the file that ``replay.cpp`` reads."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import torch
from torch import Tensor

from bidensify.deploy.bits import bits_from_signs, signs_from_tiles, tiles_from_bits
from bidensify.deploy.call import bypass_map
from bidensify.deploy.reference import convolve, packed_reference
from bidensify.deploy.spec import PackedSpec
from bidensify.exact import binarize


def random_spec(choose: random.Random) -> PackedSpec:
    """Any kind of layer, of one and of two bit planes; every combination of what it may hold."""
    kind = choose.choice(["conv", "conv", "conv", "depthwise", "conv_transpose", "linear", "pointwise"])
    groups = choose.choice([1, 1, 1, 2, 3])
    cin = groups * choose.choice([1, 3, 16, 20, 32, 33, 64, 70])
    cout = groups * choose.choice([1, 5, 16, 20, 32, 48, 70, 100])

    def pair(low: int, high: int) -> tuple[int, int]:
        return choose.randint(low, high), choose.randint(low, high)

    kernel, stride, dilation = pair(1, 5), pair(1, 3), pair(1, 3)
    padding = pair(0, 3) + pair(0, 3)
    extra = (0, 0)
    if kind == "depthwise":
        kind, cin = "conv", choose.choice([2, 16, 33, 70, 96])
        cout = groups = cin
    if kind == "linear":
        groups = 1
    if kind in ("linear", "pointwise"):
        kernel = stride = dilation = (1, 1)
        padding = (0, 0, 0, 0)
        kind = "conv" if kind == "pointwise" else kind
    if kind == "conv_transpose":
        padding = padding[:2] * 2
        extra = tuple(choose.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True))  # type: ignore[assignment]
    alpha = choose.random() < 0.5
    flags = [choose.random() < 0.6 for _ in range(5)]
    rare = [choose.random() < 0.3 for _ in range(4)]
    return PackedSpec(
        kind, cin, cout, kernel, stride, padding, dilation, groups, extra,
        mean_threshold=flags[0], shift=flags[1], alpha=alpha, levels=not alpha and choose.random() < 0.5,
        bypass=flags[2], bypass_padding=padding[:2], slope=flags[3], post=flags[4],
        offset=rare[0], rise=rare[1] and flags[3], clamp=rare[2], bypass_last=rare[3], planes=choose.choice([1, 2]),
    )  # fmt: skip


def _array(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return struct.pack("<q", -1)
    data = tensor.contiguous()
    raw = (data.view(torch.int16) if data.dtype == torch.bfloat16 else data).numpy().tobytes()
    return struct.pack("<q", len(raw)) + raw


def write_cases(path: Path, count: int, seed: int = 0) -> None:
    """Writes ``count`` random cases."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    records: list[bytes] = []
    while len(records) < count:
        spec = random_spec(choose)
        n, height, width = choose.randint(1, 2), choose.randint(1, 9), choose.randint(1, 36)
        oh, ow = spec.output_size(height, width)
        if min(oh, ow) < 1:
            continue
        dtype = choose.choice([torch.float32, torch.float32, torch.bfloat16])
        x = torch.randn((n, spec.in_channels, height, width), generator=generator).to(dtype)
        if choose.random() < 0.2:
            # On one side of its threshold, mostly: planes that are constant.
            x = x.abs() + choose.choice([0, 5])
        side = torch.randn(spec.side_length, generator=generator) / 2
        if spec.clamp:
            start = spec.layout["clamp"][0]
            side[start : start + 2] = torch.tensor([-2.0, 3.0])
        signs = torch.randint(0, 2, spec.weight_shape, generator=generator) * 2.0 - 1
        tiles = tiles_from_bits(bits_from_signs(signs), spec)
        residual = torch.randn((n, spec.out_channels, oh, ow), generator=generator).to(dtype)
        residual_used = residual if choose.random() < 0.2 else None
        want = packed_reference(x, tiles, side, spec, None, None, residual_used).float()
        part = {name: side[start : start + length] for name, (start, length) in spec.layout.items()}
        codes = binarize(x, part, planes=spec.planes, kernels=False).signs
        dots = convolve(codes, signs_from_tiles(tiles, spec), spec).round().to(torch.int32)
        top, left, _, _ = spec.pads(height, width)
        mode, rows, cols = bypass_map(spec, height, width) if spec.bypass else (0, None, None)
        record = struct.pack("<7q", n, height, width, spec.in_channels, oh, ow, spec.out_channels)
        record += struct.pack(
            "<18i", *spec.kernel, *spec.stride, *spec.dilation, top, left, spec.groups, spec.kind == "conv_transpose",
            spec.depthwise, dtype == torch.bfloat16, mode, *spec.bypass_padding, 0,
            spec.bypass_last, spec.planes,
        )  # fmt: skip
        nhwc = (0, 2, 3, 1)
        record += _array(x.permute(nhwc)) + _array(None if residual_used is None else residual_used.permute(nhwc))
        record += _array(tiles)
        for name in ("k", "b", "a", "levels"):
            record += _array(part.get(name))
        record += _array(None)
        for name in ("scale", "bias", "offset", "rise", "slope", "clamp", "post"):
            record += _array(part.get(name))
        record += _array(rows) + _array(cols) + _array(want.permute(nhwc)) + _array(dots.permute(nhwc))
        records.append(record)
    path.write_bytes(struct.pack("<q", len(records)) + b"".join(records))
