"""Activations of binary networks.

RPReLU: ReActNet (Liu et al., ECCV 2020, eq. 3): a shift, a PReLU with one slope per channel, a shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidensify.exact import Pointwise, wide
from bidensify.kernels import autograd
from bidensify.kernels.dense import supports
from bidensify.nn.contract import Declares
from bidensify.nn.torch_tools import one_step, traced, unseen

__all__ = ["ByWidth", "RPReLU"]


class RPReLU(Declares, nn.Module):
    """y = PReLU(x + bias_in) + bias_out with all three per channel.

    Args:
        channels: C.
        dim: 1 for (N, C, ...), -1 for (..., C).
        slope: initial slope of the negative side.

    Shape: (N, C, ...) or (..., C), kept. The negative side is kept, so that a binarizer behind sees both signs.
    """

    declarations: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "folded": ("forward", "after_shift"),
        "fused": ("forward", "after_shift"),
    }

    def __init__(self, channels: int, dim: int = 1, slope: float = 0.25) -> None:
        super().__init__()
        if dim not in (1, -1):
            raise ValueError(f"RPReLU: dim={dim} must be 1 (channels first) or -1 (channels last)")
        self.channels = channels
        self.dim = dim
        self.bias_in = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))
        self.bias_out = nn.Parameter(torch.zeros(channels))

    def folded(self) -> Pointwise | None:
        """A shift, two slopes, a shift."""
        return Pointwise(self.bias_in, slope=self.slope, after=self.bias_out)

    def fused(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(bias_in, slope, bias_out) where a training kernel may stand for a call of this part, else None."""
        parameters = (self.bias_in, self.slope, self.bias_out)
        return parameters if all(each.dtype == torch.float32 for each in parameters) else None

    def _shape(self, parameter: Tensor, x: Tensor) -> Tensor:
        shaped = parameter if self.dim == -1 else parameter.view(-1, *([1] * (x.dim() - 2)))
        return shaped.to(x.dtype)

    @torch.no_grad()
    def centre(self, mean: Tensor, deviation: Tensor) -> None:
        """Sets ``bias_out`` so that inputs of these statistics leave with a mean of 0.

        A bypass hands the activation's mean on to the next layer, which adds its own: uncentred, the offset grows with
        every layer until the activation sees positive values only, is the identity, and no longer bounds the signal.

        Args:
            mean, deviation: (C,) each, of normally distributed inputs; the deviation's sign does not matter.
        """
        to = wide(mean.device)
        mean, deviation = mean.to(to), deviation.to(to).abs().clamp(min=1e-12)
        scaled = mean / deviation
        density = torch.exp(-scaled.square() / 2) / (2 * pi) ** 0.5
        # Means of the positive and of the negative part, each as a magnitude: sigma * (phi(t) + t * Phi(t)) and its mirror.
        positive = deviation * density + mean * torch.special.ndtr(scaled)
        negative = deviation * density - mean * torch.special.ndtr(-scaled)
        self.bias_out.copy_(self.slope * negative - positive)

    def forward(self, x: Tensor) -> Tensor:
        if traced(x):
            return one_step(self, x)
        parameters = unseen(self._kernel_parameters, x)
        if parameters is not None:
            return autograd.post(x, None, None, parameters, self.dim)
        return self.after_shift(x + self._shape(self.bias_in, x))

    def _kernel_parameters(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """``fused``, where a kernel takes ``x``."""
        if x.shape[self.dim] != self.channels:
            raise ValueError(
                f"RPReLU: the input has {x.shape[self.dim]} channels on dimension {self.dim} (shape "
                f"{tuple(x.shape)}), the layer was made for {self.channels}"
            )
        return self.fused() if supports(x) else None

    def after_shift(self, x: Tensor) -> Tensor:
        """The activation of an input to which ``bias_in`` has already been added (a BatchNorm can carry it)."""
        if self.dim == 1:
            y = F.prelu(x, self.slope.to(x.dtype))
        elif torch.compiler.is_exporting():
            # The same values; XNNPACK has no `where`, and ExecuTorch's own takes a fifth of a transformer's time.
            y = F.relu(x) - F.relu(-x) * self.slope.to(x.dtype)
        else:
            y = torch.where(x >= 0, x, x * self.slope.to(x.dtype))
        return y + self._shape(self.bias_out, x)

    def extra_repr(self) -> str:
        return f"{self.channels}" + (", dim=-1" if self.dim == -1 else "")


class ByWidth(nn.Module):
    """One activation for each number of channels, for a module that a network calls on several widths.

    Args:
        original: what the network had; it stays for every other width.
        activations: number of channels -> activation.
        dim: where the channels are: 1 or -1.

    Shape: as the activations', kept.
    """

    def __init__(self, original: nn.Module, activations: Mapping[int, nn.Module], dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.original = original
        self.widths = nn.ModuleDict({str(width): activation for width, activation in activations.items()})

    def forward(self, x: Tensor) -> Tensor:
        if traced(x):
            return one_step(self, x)
        width = unseen(self._width, x)
        return cast(Tensor, self.widths[width](x) if width in self.widths else self.original(x))

    def _width(self, x: Tensor) -> str:
        return str(x.shape[self.dim])
