"""The forward pass of latent convolutions on bits: what float convolutions over two values each give, from popcounts.

One ``torch.library`` operator over the packed kernels. Training's forward and evaluation use it; the backward pass is torch's
own convolution, on activations and weights that are made again (``recompute``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bidensify.kernels.dense import supports
from bidensify.kernels.library import library
from bidensify.kernels.structures import PackedArguments

__all__ = ["binary_conv", "convolve", "takes"]

# A window of fewer bits than this is faster in float (depthwise layers, the first layers of narrow networks).
_LEAST_FAN_IN = 64
# ``bd_tier``: AVX-512, AVX2, NEON; in portable code torch's convolution is faster.
_FAST = (2, 1, 3)
_SCHEMA = (
    "binary_conv(Tensor x, Tensor? thresholds, Tensor? levels, Tensor weight, Tensor scale, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, int planes=1) -> Tensor"
)


@lru_cache(maxsize=1)
def _tier() -> int | None:
    found = library()
    if found is None or not hasattr(found, "bd_weight_tiles"):
        return None
    built = int(found.bd_tiers())
    return next((tier for tier in _FAST if built >> tier & 1), None)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the operator computes a convolution of ``x`` (N, C_in, H, W) faster than torch does.

    It takes float32 on the CPU, dense in channels_last, outside of autocast.
    """
    return (
        x.dim() == 4
        and weight.dim() == 4
        and x.dtype == torch.float32 == weight.dtype
        and weight[0].numel() >= _LEAST_FAN_IN
        and supports(x)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and _tier() is not None
    )


def _size(given: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (given + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _empty(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    size = [_size(*each) for each in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)]
    if min(size) < 1:
        raise RuntimeError(
            f"binary_conv: a kernel of {tuple(weight.shape[2:])} with padding {tuple(padding)} does not fit an input of "
            f"{tuple(x.shape[2:])}; give a larger input"
        )
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last), size


def _run(
    x: Tensor,
    thresholds: Tensor | None,
    levels: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    planes: int = 1,
) -> Tensor:
    found, tier = library(), _tier()
    assert found is not None
    assert tier is not None
    y, size = _empty(x, weight, stride, padding, dilation)
    (n, cin, height, width), (cout, per_group, kh, kw) = x.shape, weight.shape
    depthwise = groups == cin == cout
    words = (cin if depthwise else per_group) + 31 >> 5
    count = kh * kw * words if depthwise else groups * (cout // groups + 15 >> 4) * kh * kw * words * 16
    for name, tensor, shape in (
        ("thresholds", thresholds, (n, cin)),
        ("levels", levels, (n, 2)),
        ("scale", scale, (cout,)),
        ("bias", bias, (cout,)),
    ):
        if tensor is not None and (
            tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous()
        ):
            raise RuntimeError(f"binary_conv: {name} of shape {tuple(tensor.shape)} must be {shape}, dense, float32")
    tiles = torch.empty(count, dtype=torch.int32)
    shift = scale.new_zeros(cout) if bias is None else bias
    arguments = PackedArguments(
        n, height, width, cin, *size, cout, kh, kw, *stride, *dilation, *padding, groups, 0, depthwise, planes
    )  # fmt: skip
    arguments.tier, arguments.threads = tier, torch.get_num_threads()
    arguments.x, arguments.y, arguments.tiles, arguments.tiles_length = (
        x.data_ptr(),
        y.data_ptr(),
        tiles.data_ptr(),
        count,
    )
    arguments.scale, arguments.bias = scale.data_ptr(), shift.data_ptr()
    arguments.thresholds = None if thresholds is None else thresholds.data_ptr()
    arguments.levels = None if levels is None else levels.data_ptr()
    arguments.per_sample_levels = 1
    strides = (ctypes.c_int64 * 4)(*weight.stride())
    status = found.bd_weight_tiles(ctypes.byref(arguments), weight.data_ptr(), strides, tiles.data_ptr())
    status = status or found.bd_packed_conv2d(ctypes.byref(arguments))
    if status:
        raise RuntimeError(
            f"binary_conv failed with status {status} on x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        )
    return y


_LIBRARY: Any = torch.library.Library("bidensify", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("binary_conv", _run, "CPU")
torch.library.register_fake(
    "bidensify::binary_conv",
    lambda x, thresholds, levels, weight, scale, bias, stride, padding, dilation, groups, planes=1: _empty(
        x, weight, stride, padding, dilation
    )[0],
    lib=_LIBRARY,
)

# (x, thresholds, levels, weight, scale, bias, stride, padding, dilation, groups, planes) -> y: the convolution, plus bias, of
# high where x >= threshold and low elsewhere with scale * sign(weight). x: (N, C_in, H, W) dense in channels_last; thresholds:
# (N, C_in), or None for 0; levels: (N, 2), low and high, or None for -1 and +1; scale: (C_out,). All float32; padding is with
# zeros. With two planes x stands for one of four levels, see ``bidensify.nn.ActivationBinarizer``.
binary_conv = torch.ops.bidensify.binary_conv.default


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Tensor,
        binary: Tensor,
        bias: Tensor | None,
        source: Tensor,
        thresholds: Tensor | None,
        levels: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        remake: Sequence[Callable[[], Tensor]],
        geometry: tuple[Any, ...],
        planes: int,
    ) -> Tensor:
        ctx.remake, ctx.geometry, ctx.bias = remake, geometry, None if bias is None else list(bias.shape)
        # Saved so that a change in place between the passes is noticed.
        ctx.save_for_backward(source, weight)
        y: Tensor = binary_conv(source, thresholds, levels, weight, scale, bias, *geometry, planes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _ = ctx.saved_tensors
        activation, binary = (make() for make in ctx.remake)
        stride, padding, dilation, groups = ctx.geometry
        grads = torch.ops.aten.convolution_backward(
            grad,
            activation,
            binary,
            ctx.bias,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            list(ctx.needs_input_grad[:3]),
        )
        return (*grads, *(None,) * 8)


def convolve(
    activation: Tensor,
    binary: Tensor,
    bias: Tensor | None,
    *,
    source: Tensor,
    thresholds: Tensor | None,
    levels: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    remake: Sequence[Callable[[], Tensor]],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    planes: int = 1,
) -> Tensor:
    """The differentiable convolution of a binarized input with a binarized weight; its forward pass is ``binary_conv``.

    Args:
        activation, binary: input and weight as autograd knows them; of their memory nothing is read.
        bias: (C_out,) or None.
        source, thresholds, levels, weight, scale: what both are made of, see ``binary_conv``; detached.
        remake: give the values of ``activation`` and of ``binary`` for the backward pass.
        geometry: stride, padding, dilation, groups.
        planes: bit planes of the binarized input.
    """
    result: Tensor = _Convolve.apply(
        activation, binary, bias, source, thresholds, levels, weight, scale, remake, geometry, planes
    )
    return result
