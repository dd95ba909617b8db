"""What a call of the kernels needs to know beside its pointers, worked out once per layer and input shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bidensify.deploy.between.deferred import Part
from bidensify.deploy.reference import make_bypass
from bidensify.deploy.spec import PackedSpec
from bidensify.errors import ConfigError
from bidensify.kernels.structures import PackedArguments

__all__ = ["Prepared", "bypass_map", "prepare"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Prepared:
    """A layer on inputs of one shape and dtype; made by ``prepare``.

    Attributes:
        out_shape: (N, C_out, H', W').
        out_dtype: of the result.
        side: (field of ``PackedArguments``, byte offset in the side vector) of each stored parameter.
    """

    def __init__(self, spec: PackedSpec, shape: torch.Size, dtype: torch.dtype, tier: int, dots: bool) -> None:
        if len(shape) != 4 or shape[1] != spec.in_channels:
            raise ConfigError(f"packed_conv2d: x of shape {tuple(shape)} must be (N, {spec.in_channels}, H, W)")
        n, c, height, width = shape
        oh, ow = spec.output_size(height, width)
        if oh < 1 or ow < 1 or height < 1 or width < 1:
            raise ConfigError(
                f"packed_conv2d: an input of {height}x{width} gives an output of {oh}x{ow}; give a larger input"
            )
        self.out_shape = (n, spec.out_channels, oh, ow)
        self.out_dtype = torch.int32 if dots else dtype
        self.side = tuple((name, 4 * start) for name, (start, _) in spec.layout.items())
        self._tiles_shape = torch.Size(spec.tiles_shape)
        self._side_shape = torch.Size((spec.side_length,))
        self._thresholds_shape = torch.Size((n, spec.in_channels))
        self._levels_shape = torch.Size((n, 2))
        top, left, _, _ = spec.pads(height, width)
        # The tables stay alive with this object, which holds their addresses.
        mode, self._rows, self._cols = bypass_map(spec, height, width) if spec.bypass else (0, None, None)
        self._template = PackedArguments(
            n, height, width, c, oh, ow, spec.out_channels,
            *spec.kernel, *spec.stride, *spec.dilation, top, left, spec.groups,
            spec.kind == "conv_transpose", spec.depthwise, spec.planes, _DTYPES[dtype], mode, *spec.bypass_padding,
            spec.bypass_last, tier,
        )  # fmt: skip
        self._template.tiles_length = self._tiles_shape.numel()
        self._template.rows = None if self._rows is None else self._rows.data_ptr()
        self._template.cols = None if self._cols is None else self._cols.data_ptr()

    def arguments(self) -> PackedArguments:
        """A copy of the template, whose pointers are to be filled in."""
        return PackedArguments.from_buffer_copy(self._template)

    def check(
        self,
        x: Tensor,
        tiles: Tensor,
        side: Tensor,
        thresholds: Tensor | None,
        levels: Tensor | None,
        residual: Tensor | None,
    ) -> None:
        """Raises ConfigError where a tensor is not of the size, dtype and device that the kernels will read."""
        device = x.device
        for name, tensor, shape, dtype in (
            ("tiles", tiles, self._tiles_shape, torch.int32),
            ("side", side, self._side_shape, torch.float32),
            ("thresholds", thresholds, self._thresholds_shape, torch.float32),
            ("levels", levels, self._levels_shape, torch.float32),
        ):
            if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
                raise ConfigError(
                    f"packed_conv2d: {name} of shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device} must be "
                    f"{tuple(shape)}, {dtype}, {device}"
                )
        if residual is not None and tuple(residual.shape) != self.out_shape:
            raise ConfigError(f"packed_conv2d: residual of shape {tuple(residual.shape)} must be {self.out_shape}")

    def check_parts(self, parts: Sequence[Part], x: Tensor) -> None:
        """Raises ConfigError where parts do not make up an input of x's shape and dtype."""
        n, channels, height, width = x.shape
        found = 0
        for part in parts:
            size = (n, part.x.shape[1], height // part.up, width // part.up)
            dense = part.x.is_contiguous(memory_format=torch.channels_last)
            if (
                tuple(part.x.shape) != size
                or height % part.up
                or width % part.up
                or part.x.dtype != x.dtype
                or not dense
            ):
                raise ConfigError(
                    f"packed_conv2d: a part of shape {tuple(part.x.shape)} and dtype {part.x.dtype}, upsampled {part.up} "
                    f"times, is not a channels_last part of an input {tuple(x.shape)} of {x.dtype}"
                )
            found += part.x.shape[1]
        if found != channels:
            raise ConfigError(f"packed_conv2d: the parts have {found} channels, the input {channels}")


@lru_cache(maxsize=1024)
def prepare(spec: PackedSpec, shape: torch.Size, dtype: torch.dtype, tier: int, dots: bool = False) -> Prepared:
    """See ``Prepared``.

    Raises:
        ConfigError: the layer does not take inputs of this shape.
    """
    return Prepared(spec, shape, dtype, tier, dots)


def bypass_map(spec: PackedSpec, height: int, width: int) -> tuple[int, Tensor | None, Tensor | None]:
    """(mode, rows, columns) of the bypass: 1 = one source pixel per output pixel (None: the same), 2 = averages."""
    bypass = make_bypass(spec)
    size = spec.output_size(height, width)
    if size == (height, width):
        return 1, None, None
    if bypass.averages((height, width), size):
        return 2, None, None
    rows = bypass.to_size(torch.arange(height, dtype=torch.float64).view(1, 1, -1, 1).expand(1, 1, height, width), size)
    cols = bypass.to_size(torch.arange(width, dtype=torch.float64).view(1, 1, 1, -1).expand(1, 1, height, width), size)
    return 1, rows[0, 0, :, 0].to(torch.int32).contiguous(), cols[0, 0, 0, :].to(torch.int32).contiguous()
