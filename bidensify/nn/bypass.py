"""Channel-adaptive full-precision bypass (CFB): a parameter-free signal beside every binary layer.

Source: BiDense (arXiv 2411.10346), section 3.3. The grouping of fusion-down differs on purpose from the paper's
code: channel i goes into group i mod m, so that fusion-down inverts fusion-up exactly whenever one channel count
divides the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidensify.exact.definition import fusion_down_in_order
from bidensify.nn.contract import Declares

__all__ = ["Bypass", "fusion", "fusion_down", "fusion_matrix", "fusion_up"]


def _check(name: str, x: Tensor, out_channels: int, dim: int) -> int:
    if not isinstance(out_channels, int) or out_channels < 1:
        raise ValueError(f"{name}: out_channels={out_channels!r} must be a positive integer")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{name}: dim={dim} is outside the input's {x.dim()} dimensions (shape {tuple(x.shape)})")
    return dim % x.dim()


def fusion_up(x: Tensor, out_channels: int, dim: int = 1) -> Tensor:
    """Repeats the channels of ``x`` until there are ``out_channels``.

    The first C * (out_channels // C) channels are whole copies of ``x``; the remaining out_channels mod C are
    ``fusion_down(x, remainder)``.

    Args:
        x: (N, C, ...) with C on ``dim``.
        out_channels: at least C.
        dim: the channel dimension.

    Raises:
        ValueError: ``out_channels`` is below C.
    """
    dim = _check("fusion_up", x, out_channels, dim)
    channels = int(x.shape[dim])
    if out_channels < channels:
        raise ValueError(
            f"fusion_up: out_channels={out_channels} is below the input's {channels} channels; use fusion_down"
        )
    copies, remainder = divmod(out_channels, channels)
    if copies == 1 and remainder == 0:
        return x
    parts = [x] * copies
    if remainder:
        parts.append(fusion_down(x, remainder, dim))
    return torch.cat(parts, dim)


def fusion_down(x: Tensor, out_channels: int, dim: int = 1) -> Tensor:
    """Averages the channels of ``x`` in ``out_channels`` groups; channel i goes into group i mod ``out_channels``.

    Args:
        x: (N, C, ...) with C on ``dim``.
        out_channels: at most C.
        dim: the channel dimension.

    Raises:
        ValueError: ``out_channels`` is above C.
    """
    dim = _check("fusion_down", x, out_channels, dim)
    channels = int(x.shape[dim])
    if out_channels > channels:
        raise ValueError(
            f"fusion_down: out_channels={out_channels} is above the input's {channels} channels; use fusion_up"
        )
    if out_channels == channels:
        return x
    if dim == 1 and x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        # Splitting the channel dimension would lose the memory format.
        return fusion_down(x.permute(0, 2, 3, 1), out_channels, -1).permute(0, 3, 1, 2)
    whole, remainder = divmod(channels, out_channels)
    body = x.narrow(dim, 0, whole * out_channels)
    total = body.reshape(*x.shape[:dim], whole, out_channels, *x.shape[dim + 1 :]).sum(dim)
    if remainder == 0:
        return total / whole
    tail = x.narrow(dim, whole * out_channels, remainder)
    large = (total.narrow(dim, 0, remainder) + tail) / (whole + 1)
    small = total.narrow(dim, remainder, out_channels - remainder) / whole
    return torch.cat([large, small], dim)


def fusion(x: Tensor, out_channels: int, dim: int = 1) -> Tensor:
    """``fusion_up`` or ``fusion_down``, whichever leads from the channels of ``x`` to ``out_channels``."""
    if out_channels >= x.shape[dim]:
        return fusion_up(x, out_channels, dim)
    return fusion_down(x, out_channels, dim)


def fusion_matrix(in_channels: int, out_channels: int) -> Tensor:
    """The fusion as a matrix (out_channels, in_channels) whose rows sum to 1."""
    return fusion(torch.eye(in_channels, dtype=torch.float64), out_channels, dim=1).T


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    pair = tuple(int(v) for v in value)
    if len(pair) == 1:
        return pair[0], pair[0]
    if len(pair) != 2:
        raise ValueError(f"Bypass: {name}={value!r} must be one integer or two")
    return pair[0], pair[1]


class Bypass(Declares, nn.Module):
    """CFB for any geometry: (N, C_in, H, W) -> (N, C_out, H', W') with H', W' as the layer's own output has.

    * stride 1 "same" (dilated too): identity in space;
    * strided: average pooling with the convolution's kernel, stride and padding, padding not counted (padding of at
      most half the kernel and no dilation, as torch's pooling has it);
    * transposed: nearest upsampling, cropped or padded (edge values) to the output;
    * anything else: the centre of each window.

    Channels go through ``fusion_up`` / ``fusion_down``. There are no parameters and no buffers.
    """

    declarations: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "exact": ("forward", "after_fusion_down", "to_size", "averages")
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        *,
        transposed: bool = False,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size, "kernel_size")
        self.stride = _pair(stride, "stride")
        self.dilation = _pair(dilation, "dilation")
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"Bypass: padding={padding!r} must be 'same', 'valid' or integers")
            # The total of "same" padding is odd for an even reach; its smaller half comes first, as in torch.
            reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size)]
            self.padding = (reach[0] // 2, reach[1] // 2)
        else:
            self.padding = _pair(padding, "padding")
        self.transposed = transposed
        self.dim = dim

    def to_size(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """The spatial part alone: (N, C, H, W) -> (N, C, H', W')."""
        height, width = size
        if x.shape[-2:] == (height, width):
            return x
        if self.transposed:
            return self._upsample(x, height, width)
        if self.averages(x.shape[-2:], size):
            return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding, count_include_pad=False)
        return self._centres(x, height, width)

    def averages(self, given: Sequence[int], size: Sequence[int]) -> bool:
        """Whether an output of ``size`` = (H', W') for an input of ``given`` = (H, W) is the average of each window."""
        if tuple(given) == tuple(size) or self.transposed or max(self.stride) == 1 or max(self.dilation) > 1:
            return False
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        # torch limits pooling's padding to half the kernel, and the layer may pad more, or on one side only
        # ("same" padding of a strided layer): such a window gives its centre.
        pooled = ((given[0] + 2 * ph - kh) // sh + 1, (given[1] + 2 * pw - kw) // sw + 1)
        return pooled == tuple(size) and 2 * ph <= kh and 2 * pw <= kw

    def _centres(self, x: Tensor, height: int, width: int) -> Tensor:
        for axis, size in ((0, height), (1, width)):
            length = x.shape[axis - 2]
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            # For "same" padding computed from the input's size the pad is half of what the output needs.
            pad = self.padding[axis]
            if (length + 2 * pad - reach - 1) // self.stride[axis] + 1 != size:
                pad = max(0, (size - 1) * self.stride[axis] + reach + 1 - length) // 2
            start = reach // 2 - pad
            step = self.stride[axis]
            if step == 1 and start >= 0 and start + size <= length:
                x = x.narrow(axis - 2, start, size)
            else:
                index = torch.arange(size, device=x.device) * step + start
                x = x.index_select(axis - 2, index.clamp(0, length - 1))
        return x

    def _upsample(self, x: Tensor, height: int, width: int) -> Tensor:
        for axis, size in ((0, height), (1, width)):
            length = x.shape[axis - 2]
            # Output position o receives input i when o = i * stride - padding + tap; the window's centre is the
            # input whose footprint starts nearest, which for kernel == stride is plain nearest upsampling.
            slack = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1 - self.stride[axis]
            shift = self.padding[axis] - slack // 2
            index = torch.div(
                torch.arange(size, device=x.device) + shift, self.stride[axis], rounding_mode="floor"
            ).clamp(0, length - 1)
            x = x.index_select(axis - 2, index)
        return x

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """x: (N, C_in, H, W) and ``size`` = (H', W') of the layer's output; or (..., C_in) with ``dim=-1``.

        Raises:
            ValueError: the channel count of ``x`` is not ``in_channels``.
        """
        if x.shape[self.dim] != self.in_channels:
            raise ValueError(
                f"Bypass: the input has {x.shape[self.dim]} channels on dimension {self.dim} (shape "
                f"{tuple(x.shape)}), the layer was made for {self.in_channels}"
            )
        if self.out_channels < self.in_channels:
            # Fewer channels first: the spatial part then reads less.
            x = fusion_down(x, self.out_channels, self.dim)
        return self.after_fusion_down(x, size)

    def after_fusion_down(self, x: Tensor, size: Sequence[int] | None) -> Tensor:
        """The rest of ``forward``: space, then fusion-up. x: (N, min(C_in, C_out), H, W)."""
        if size is not None:
            x = self.to_size(x, size)
        if self.out_channels > self.in_channels:
            x = fusion_up(x, self.out_channels, self.dim)
        return x

    def exact(self, x: Tensor, size: Sequence[int]) -> Tensor | None:
        """``forward`` in the order of the definition (``bidensify.exact``): averages over space, then over channels.

        Args:
            x: (N, C_in, H, W) float32; a bypass over the last dimension is taken for the pointwise one that it is.
            size: (H', W').

        Returns:
            (N, C_out, H', W') float32; ``x`` itself where nothing is to be done.
        """
        channels, out = self.in_channels, self.out_channels
        averaged = self.dim == 1 and self.averages(x.shape[-2:], size)
        if out < channels and not averaged:
            # Picking positions commutes with averaging channels, and less is picked this way.
            x = fusion_down_in_order(x, out)
        if self.dim == 1:
            x = self.to_size(x, size)
        if out < channels:
            return fusion_down_in_order(x, out)
        copies, rest = divmod(out, channels)
        if copies == 1 and rest == 0:
            return x
        return torch.cat([x] * copies + ([fusion_down_in_order(x, rest)] if rest else []), 1)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}"
        if self.dim == 1:
            text += f", kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
            if self.dilation != (1, 1):
                text += f", dilation={self.dilation}"
        if self.transposed:
            text += ", transposed=True"
        return text
