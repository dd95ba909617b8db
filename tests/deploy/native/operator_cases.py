"""Random calls of ``bidensify::packed_layer`` with the reference's results, in the file that ``operator.cpp`` reads."""

from __future__ import annotations

import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bidensify.deploy.bits import bits_from_signs, tiles_from_bits
from bidensify.deploy.operator import PARTS_INNER, RESULT_INNER, spec_ints
from bidensify.deploy.spec import PackedSpec

from cases import random_spec  # isort: skip

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}


def operator_spec(choose: random.Random) -> PackedSpec:
    """What ``random_spec`` gives, "same" padding and binarizers of a method's own."""
    spec = random_spec(choose)
    if spec.kind == "conv" and choose.random() < 0.2:
        spec = replace(spec, padding=(0, 0, 0, 0), same=True)
    if choose.random() < 0.2:
        spec = replace(spec, mean_threshold=False, shift=False, alpha=False, levels=False, custom=True)
    return spec


def split(choose: random.Random, channels: int, height: int, width: int) -> tuple[list[tuple[int, int]], int, int]:
    """(channels, upsampling) of some parts, and a size that all of them divide."""
    parts, left = [], channels
    while left and len(parts) < 4:
        size = choose.randint(1, left)
        parts.append((size, choose.choice([1, 1, 2, 4])))
        left -= size
    if left:
        parts.append((left, 1))
    most = max(up for _, up in parts)
    return parts, -(-height // most) * most, -(-width // most) * most


def _tensor(tensor: Tensor | None, last: bool = False) -> bytes:
    """dtype, dimensions, bytes, whether it lies in channels_last; sizes; memory."""
    if tensor is None:
        return struct.pack("<i", -1)
    data = tensor.permute(0, 2, 3, 1).contiguous() if last else tensor.contiguous()
    raw = (data.view(torch.int16) if data.dtype == torch.bfloat16 else data).numpy().tobytes()
    return struct.pack(f"<4i{tensor.dim()}q", _TYPES[tensor.dtype], tensor.dim(), len(raw), last, *tensor.shape) + raw


def write_operator_cases(path: Path, count: int, seed: int = 0) -> None:
    """Writes ``count`` random calls."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    os.environ["BIDENSIFY_KERNEL"] = "reference"
    records: list[bytes] = []
    while len(records) < count:
        spec = operator_spec(choose)
        n, height, width = choose.randint(1, 3), choose.randint(1, 9), choose.randint(1, 20)
        dtype = choose.choice([torch.float32, torch.float32, torch.bfloat16])
        if spec.kind == "linear":
            shape = (n, *(choose.randint(1, 6) for _ in range(choose.randint(0, 2))), spec.in_channels)
            parts, up = [noise(*shape).to(dtype)], [1]
            out = (*shape[:-1], spec.out_channels)
        else:
            found = [(spec.in_channels, 1)]
            if choose.random() < 0.5:
                found, height, width = split(choose, spec.in_channels, height, width)
            up = [times for _, times in found]
            oh, ow = spec.output_size(height, width)
            if min(oh, ow) < 1:
                continue
            parts = [noise(n, size, height // times, width // times).to(dtype) for size, times in found]
            out = (n, spec.out_channels, oh, ow)
        side = noise(spec.side_length) / 2
        if spec.clamp:
            start = spec.layout["clamp"][0]
            side[start : start + 2] = torch.tensor([-2.0, 3.0])
        signs = torch.randint(0, 2, spec.weight_shape, generator=generator) * 2.0 - 1
        tiles = tiles_from_bits(bits_from_signs(signs), spec)
        thresholds = noise(n, spec.in_channels) / 4 if spec.custom else None
        levels = noise(n, 2).sort(1).values if spec.custom else None
        residual = noise(*out).to(dtype) if choose.random() < 0.3 else None
        inner = choose.choice([0, 0, 1, 2, 3]) if spec.kind != "linear" else 0
        ints = spec_ints(spec, inner)
        if inner & PARTS_INNER:
            parts = [part.permute(0, 2, 3, 1) for part in parts]
        if inner & RESULT_INNER:
            out = (out[0], *out[2:], out[1])
            residual = None if residual is None else residual.permute(0, 2, 3, 1)
        y = torch.ops.bidensify.packed_layer(parts, up, tiles, side, ints, thresholds, levels, residual)
        assert tuple(y.shape) == out
        record = struct.pack(f"<{1 + len(up)}q", len(up), *up) + struct.pack(f"<{1 + len(ints)}q", len(ints), *ints)
        given_last, last = (spec.kind != "linear" and not inner & each for each in (PARTS_INNER, RESULT_INNER))
        # Images are read in either order.
        record += b"".join(_tensor(part, given_last and choose.random() < 0.7) for part in parts)
        record += b"".join(_tensor(tensor) for tensor in (tiles, side, thresholds, levels))
        record += _tensor(residual, last) + _tensor(y, last)
        records.append(record)
    path.write_bytes(struct.pack("<q", len(records)) + b"".join(records))
