"""One call of a native kernel: pointers and sizes, every size looked at; and the same call once more."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bidensify.deploy.between.deferred import Part
from bidensify.deploy.call import prepare
from bidensify.deploy.spec import PackedSpec
from bidensify.kernels import memory
from bidensify.kernels.library import library
from bidensify.kernels.structures import PackedArguments, PartArguments

__all__ = ["Repeated", "run"]

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
        _check(status, spec, x)
    return out


def _check(status: int, spec: PackedSpec, x: Tensor) -> None:
    if status:
        raise RuntimeError(f"the packed kernel failed: {_STATUS.get(status, status)} ({spec}, input {tuple(x.shape)})")


class _Call:
    """A layer on inputs of one shape and dtype, of which ``run`` has looked at every size."""

    def __init__(self, tier: int, x: Tensor, tiles: Tensor, side: Tensor, spec: PackedSpec) -> None:
        loaded = library()
        assert loaded is not None
        self._function: Any = loaded.bd_packed_conv2d
        self._spec, self._tokens = spec, spec.kind == "linear"
        n, *inner, channels = x.shape
        shape = torch.Size((n, channels, math.prod(inner), 1)) if self._tokens else x.shape
        self._prepared = call = prepare(spec, shape, x.dtype, tier)
        self._room = memory.room(call.out_shape, call.out_dtype)
        self._shape = (*x.shape[:-1], spec.out_channels)
        self._tiles, self._side = tiles.data_ptr(), side.data_ptr()
        self._arguments = call.arguments()
        self._arguments.tiles = self._tiles
        for name, offset in call.side:
            setattr(self._arguments, name, self._side + offset)

    def __call__(self, x: Tensor, tiles: Tensor, side: Tensor) -> Tensor | None:
        """The result, or None where x is not dense in the kernels' order or the layer's tensors are others now."""
        dense = x.is_contiguous() if self._tokens else x.is_contiguous(memory_format=torch.channels_last)
        if not dense or tiles.data_ptr() != self._tiles or side.data_ptr() != self._side:
            return None
        out = self._room.empty()
        # Another thread may be at work with this one.
        arguments = PackedArguments.from_buffer_copy(self._arguments)
        arguments.threads, arguments.x, arguments.y = torch.get_num_threads(), x.data_ptr(), out.data_ptr()
        _check(self._function(ctypes.byref(arguments)), self._spec, x)
        return out.permute(0, 2, 3, 1).view(self._shape) if self._tokens else out


class Repeated:
    """The calls of one layer by its input's shape and dtype: what was looked at once is not looked at again.

    Pointers belong to one layer in one process: a copy, pickled or not, begins anew.
    """

    _MOST = 16

    def __init__(self) -> None:
        self._calls: dict[Any, _Call] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Repeated:
        return Repeated()

    def __reduce__(self) -> tuple[type[Repeated], tuple[()]]:
        return Repeated, ()

    def call(self, tier: int, x: Tensor, tiles: Tensor, side: Tensor) -> Tensor | None:
        """What ``run`` would give, where a call of this kind was kept, else None."""
        found = self._calls.get((x.shape, x.dtype, tier))
        return None if found is None else found(x, tiles, side)

    def keep(self, tier: int, x: Tensor, tiles: Tensor, side: Tensor, spec: PackedSpec) -> None:
        """After ``run`` of the same arguments."""
        if tiles.is_contiguous() and side.is_contiguous() and x.shape[0]:
            if len(self._calls) >= self._MOST:
                self._calls.clear()
            self._calls[x.shape, x.dtype, tier] = _Call(tier, x, tiles, side, spec)
