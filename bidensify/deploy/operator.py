"""The ``torch.library`` operator behind packed layers: one name over the native kernels and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bidensify.deploy.backends import choose_backend
from bidensify.deploy.between.deferred import Deferred, only_deferring
from bidensify.deploy.reference import packed_reference
from bidensify.deploy.spec import PackedSpec
from bidensify.errors import ConfigError

__all__ = ["direct", "from_parts", "reference_operator"]

_SCHEMA = (
    "packed_conv2d(Tensor x, Tensor tiles, Tensor side, int[] spec, Tensor? thresholds, Tensor? levels, "
    "Tensor? residual, str kernel) -> Tensor"
)


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
    return packed_reference(x, tiles, side, PackedSpec.from_ints(spec), thresholds, levels, residual)


def _run(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: Sequence[int],
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
    kernel: str,
) -> Tensor:
    """What runs eagerly: the backend, or the reference where it does not take the input."""
    backend = choose_backend(kernel, x.device.type)
    if backend.run is not None and x.dtype in backend.dtypes:
        # A mode of the caller's has seen this operator; it need not see every size that is read here.
        with torch._C.DisableTorchFunction():
            return backend.run(x, tiles, side, PackedSpec.from_ints(spec), thresholds, levels, residual)
    for tensor in (tiles, side, thresholds, levels, residual):
        if tensor is not None and tensor.device != x.device:
            raise ConfigError(
                f"packed_conv2d: the input is on {x.device}, the layer or what it was given on {tensor.device}; bring "
                "both to one device"
            )
    # Autocast reaches the convolution inside, whose sums are no integers in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return reference_operator(x, tiles, side, spec, thresholds, levels, residual, kernel)


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


def direct(x: Tensor, tiles: Tensor, side: Tensor, spec: PackedSpec, kernel: str) -> Tensor | None:
    """The operator without torch's dispatcher, or None where something could tell the difference.

    The dispatcher takes a spec apart and has it put together again, which costs a small layer half of its time, and one
    whose code has left the processor's caches 0.1 ms.
    """
    if type(x) is not Tensor or not x.is_cpu or not _unwatched() or (torch.is_grad_enabled() and x.requires_grad):
        return None
    backend = choose_backend(kernel)
    if backend.run is None or x.dtype not in backend.dtypes:
        return None
    with torch._C.DisableTorchFunction():
        return backend.run(x, tiles, side, spec)


def from_parts(x: Deferred, tiles: Tensor, side: Tensor, spec: PackedSpec, kernel: str) -> Tensor | None:
    """The operator on an input that was never made, or None where its backend needs it whole."""
    backend = choose_backend(kernel)
    if backend.run is None or x.dtype not in backend.dtypes or x.parts is None:
        return None
    with torch._C.DisableTorchFunction():
        y = backend.run(x, tiles, side, spec, parts=x.parts)
    x.consumed = True
    return y


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
    layer = PackedSpec.from_ints(spec)
    height, width = layer.output_size(x.shape[2], x.shape[3])
    return torch.empty(
        (x.shape[0], layer.out_channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


_library: Any = torch.library.Library("bidensify", "DEF")  # type: ignore[no-untyped-call]
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("packed_conv2d", _run, _key)
torch.library.register_fake("bidensify::packed_conv2d", _fake, lib=_library)
