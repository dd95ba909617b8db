"""One call of a native kernel: pointers and sizes, every size looked at."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from bidensify.deploy.between.deferred import Part
from bidensify.deploy.call import prepare
from bidensify.deploy.spec import PackedSpec
from bidensify.kernels import memory
from bidensify.kernels.library import library
from bidensify.kernels.structures import PartArguments

__all__ = ["run"]

_STATUS = {1: "the arguments do not fit together", 2: "out of memory", 3: "this processor lacks the kernel"}


def run(
    tier: int,
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: PackedSpec,
    thresholds: Tensor | None = None,
    levels: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    parts: Sequence[Part] | None = None,
    dots: bool = False,
) -> Tensor:
    """Runs the native operator: see ``packed_reference`` for the arguments.

    Args:
        tier: ``bd_tier`` of csrc/packed/bidensify_kernels.h.
        parts: what ``x`` consists of, which is then not read.
        dots: returns the integer dot products (N, C_out, H', W') int32 instead of y.
    """
    loaded = library()
    assert loaded is not None, "a tier exists only where the library is loaded"
    call = prepare(spec, x.shape, x.dtype, tier, dots)
    if not (side.is_contiguous() and tiles.is_contiguous()):
        side, tiles = side.contiguous(), tiles.contiguous()
    # The kernels read raw memory: nothing reaches them whose size was not looked at.
    call.check(x, tiles, side, thresholds, levels, residual)
    if parts is not None:
        call.check_parts(parts, x)
    else:
        x = memory.channels_last(x)
    out = memory.empty(call.out_shape, call.out_dtype)
    # What the pointers below point to must live until the call returns.
    keep = []
    arguments = call.arguments()
    arguments.threads = torch.get_num_threads()
    if parts is None:
        arguments.x = x.data_ptr()
    arguments.tiles = tiles.data_ptr()
    if dots:
        arguments.dots = out.data_ptr()
    else:
        arguments.y = out.data_ptr()
    base = side.data_ptr()
    for name, offset in call.side:
        setattr(arguments, name, base + offset)
    if residual is not None:
        keep.append(memory.channels_last(residual.to(x.dtype)))
        arguments.residual = keep[-1].data_ptr()
    if thresholds is not None:
        keep.append(thresholds.contiguous())
        arguments.thresholds = keep[-1].data_ptr()
    if levels is not None:
        keep.append(levels.contiguous())
        arguments.levels, arguments.per_sample_levels = keep[-1].data_ptr(), 1
    if x.shape[0]:
        if parts is None:
            status = loaded.bd_packed_conv2d(ctypes.byref(arguments))
        else:
            records = [PartArguments(part.x.data_ptr(), part.x.shape[1], part.up, part.up) for part in parts]
            table = (PartArguments * len(records))(*records)
            status = loaded.bd_packed_conv2d_parts(ctypes.byref(arguments), table, len(records))
        if status:
            raise RuntimeError(
                f"the packed kernel failed: {_STATUS.get(status, status)} ({spec}, input {tuple(x.shape)})"
            )
    return out
