"""Rounding to 8 bits: gradients go straight through within the range, and are 0 outside of it.

Weights are symmetric per output channel (-127..127 steps of max |w| / 127, of the weights as they are now), an input is affine
per tensor (0..255 between the least and the largest value that calibration saw, 0 included, so that padding is exact). This is
how OpenVINO and XNNPACK quantize a convolution (Jacob et al., arXiv 1712.05877); a batch norm behind it folds into the weights'
steps.

The values are those of torch's ``fake_quantize`` operators, which an exported program has (ONNX: QuantizeLinear and
DequantizeLinear). They cannot be the definition: torch has no fake tensors for them, on which rewrites are checked and networks
compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Int8"]

_STEPS, _LARGEST = 255, 127
_TINY = 1e-12


def _rounded(x: Tensor, step: Tensor | float, zero: Tensor | int, least: int, most: int) -> Tensor:
    """``x`` on the levels (least - zero .. most - zero) · step."""
    steps = (x * (1 / step) + zero).clamp(least, most)
    # The difference is exact, and so is the sum: it is the rounded value itself, with the gradient of what was rounded.
    return (steps + (steps.round() - steps).detach() - zero) * step


class Int8(nn.Module):
    """The rounding of one layer's weight and input.

    Args:
        transposed, groups: of the layer's weight, which is (C_in, C_out / groups, ...) where it is transposed.

    Attributes:
        low, high: the input's range, (); equal before calibration: each input is rounded within its own range then.
        affine: its step and zero point, or None.
    """

    low: Tensor
    high: Tensor

    def __init__(self, transposed: bool = False, groups: int = 1) -> None:
        super().__init__()
        self.transposed, self.groups = transposed, groups
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.calibrating = False
        # Step and zero point as numbers: no wait for a device, and constants of an exported program.
        self.affine: tuple[float, int] | None = None
        self._settled = (-1, -1)
        self._seen: Tensor | None = None

    def begin_calibration(self) -> None:
        """Forgets earlier batches and starts listening; what comes in is rounded within what was seen so far."""
        self.calibrating, self._seen = True, None

    def end_calibration(self) -> None:
        """Stops listening; without any input the range stays as it was."""
        if self._seen is not None:
            self.low.copy_(self._seen[0])
            self.high.copy_(self._seen[1])
            self._settle()
        self.calibrating, self._seen = False, None

    def _settle(self) -> None:
        self.affine = None
        if not self.low.is_inference():
            self._settled = self.low._version, self.high._version
        if not self.low.is_meta and float(self.high) > float(self.low):
            step = (float(self.high) - float(self.low)) / _STEPS
            self.affine = step, round(-float(self.low) / step)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8:
        low, high = self.low, self.high
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not low.is_meta:
            # A range keeps its dtype, whatever the network is cast to: rounded it would be another one.
            self.low, self.high = low.to(self.low.device), high.to(self.high.device)
        return self

    def _settle_again(self) -> None:
        """Reads the buffers once more where something wrote to them: what copies buffers (averages of models) says nothing."""
        low, high = self.low, self.high
        if not (torch.compiler.is_compiling() or low.is_inference()) and (low._version, high._version) != self._settled:
            self._settle()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on 256 levels, in its dtype."""
        self._settle_again()
        if self.affine is None or self.calibrating:
            step, zero = self._listened(x.detach())
            return _rounded(x.float(), step, zero, 0, _STEPS).to(x.dtype)
        if torch.compiler.is_exporting():
            return torch.fake_quantize_per_tensor_affine(x.float(), *self.affine, 0, _STEPS).to(x.dtype)
        return _rounded(x.float(), *self.affine, 0, _STEPS).to(x.dtype)

    def _listened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(step, zero point), () each, of what ``x`` and the batches before it span."""
        low, high = x.amin().float().clamp(max=0), x.amax().float().clamp(min=0)
        if self.calibrating:
            if self._seen is not None:
                low, high = torch.minimum(low, self._seen[0]), torch.maximum(high, self._seen[1])
            self._seen = torch.stack([low, high])
        step = ((high - low) / _STEPS).clamp(min=_TINY)
        return step, (-low / step).round()

    def weight(self, weight: Tensor) -> Tensor:
        """A weight on 255 levels per output channel, in its dtype."""
        rows = self._rows(weight).float()
        step = (rows.detach().flatten(1).abs().amax(1) / _LARGEST).clamp(min=_TINY)
        if torch.compiler.is_exporting():
            zero = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
            # -128 is never reached: it stands here because ONNX knows no other range.
            rounded = torch.fake_quantize_per_channel_affine(rows, step, zero, 0, -_LARGEST - 1, _LARGEST)
        else:
            # Clamped a step further out: the largest weight is 127 steps but for rounding, and must not lose its gradient.
            step = step.view(-1, *[1] * (rows.dim() - 1))
            rounded = _rounded(rows, step, 0, -_LARGEST - 1, _LARGEST + 1)
        return self._back(rounded, weight).to(weight.dtype)

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight with its output channels first."""
        if not self.transposed:
            return weight
        return weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)

    def _back(self, rows: Tensor, like: Tensor) -> Tensor:
        if not self.transposed:
            return rows
        return rows.reshape(self.groups, -1, *rows.shape[1:]).transpose(1, 2).reshape(like.shape)
