"""The shared library of kernels: found, loaded and called through ctypes."""

from __future__ import annotations

from torch import Tensor

from bidensify.runtime.spec import LayerSpec

__all__ = ["run", "tier"]


def tier(kernel: str) -> int | None:
    """The number of the kernel tier that runs, or None for the reference."""
    return None


def run(
    tier: int,
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: LayerSpec,
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Runs the native operator."""
    raise NotImplementedError
