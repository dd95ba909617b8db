"""The ``torch.library`` operator behind packed layers: one name over the native kernels and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bidensify.errors import ConfigError
from bidensify.runtime import native
from bidensify.runtime.deferred import only_deferring
from bidensify.runtime.reference import packed_reference
from bidensify.runtime.spec import LayerSpec

__all__ = ["KERNELS", "check_kernel", "direct", "reference_operator"]

KERNELS = ("auto", "reference", "portable", "avx2", "avx512", "neon")

# Of inputs that kernels read.
_DTYPES = (torch.float32, torch.bfloat16)
_SCHEMA = (
    "packed_conv2d(Tensor x, Tensor tiles, Tensor side, int[] spec, Tensor? thresholds, Tensor? levels, "
    "Tensor? residual, str kernel) -> Tensor"
)


def check_kernel(kernel: str) -> str:
    """Returns ``kernel``.

    Raises:
        ConfigError: there is no kernel of this name.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"kernel={kernel!r} must be one of {list(KERNELS)}")
    return kernel


def reference_operator(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: Sequence[int],
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
    kernel: str,
) -> Tensor:
    """The operator in plain PyTorch, channels_last: on devices without kernels, and as its decomposition for export."""
    y = packed_reference(x, tiles, side, LayerSpec.from_ints(spec), thresholds, levels, residual)
    return y.contiguous(memory_format=torch.channels_last)


def _without_kernels(x: Tensor, *arguments: Any) -> Tensor:
    """What runs on CUDA, MPS and XPU, and on the CPU for ``kernel="reference"``."""
    for tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise ConfigError(
                f"packed_conv2d: the input is on {x.device}, the layer or what it was given on {tensor.device}; bring "
                "both to one device"
            )
    # Autocast reaches the convolution inside, whose sums are no integers in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return reference_operator(x, *arguments)


def _cpu(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: Sequence[int],
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
    kernel: str,
) -> Tensor:
    tier = native.tier(kernel)
    if tier is None or x.dtype not in _DTYPES:
        return _without_kernels(x, tiles, side, spec, thresholds, levels, residual, kernel)
    # A mode of the caller's has seen this operator; it need not see every size that is read here.
    with torch._C.DisableTorchFunction():
        return native.run(tier, x, tiles, side, LayerSpec.from_ints(spec), thresholds, levels, residual)


def _unwatched() -> bool:
    """Whether no mode, transform, tracer or profiler of anybody's would see an operator that is called now."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or not only_deferring()
    )


def direct(x: Tensor, tiles: Tensor, side: Tensor, spec: LayerSpec, kernel: str) -> Tensor | None:
    """The operator without torch's dispatcher, or None where something could tell the difference.

    The dispatcher takes a spec apart and has it put together again, which costs a small layer half of its time, and one
    whose code has left the processor's caches 0.1 ms.
    """
    if type(x) is not Tensor or not x.is_cpu or x.dtype not in _DTYPES or not _unwatched():
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    tier = native.tier(kernel)
    if tier is None:
        return None
    with torch._C.DisableTorchFunction():
        return native.run(tier, x, tiles, side, spec, None, None, None)


def _fake(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: Sequence[int],
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
    kernel: str,
) -> Tensor:
    layer = LayerSpec.from_ints(spec)
    height, width = layer.output_size(x.shape[2], x.shape[3])
    return torch.empty(
        (x.shape[0], layer.out_channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


_library: Any = torch.library.Library("bidensify", "DEF")  # type: ignore[no-untyped-call]
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("packed_conv2d", _cpu, "CPU")
for _key in ("CUDA", "MPS", "XPU"):
    _library.impl("packed_conv2d", _without_kernels, _key)
torch.library.register_fake("bidensify::packed_conv2d", _fake, lib=_library)
