"""The operator of packed layers (``operator``) without torch's dispatcher, where nothing could tell the difference.

The dispatcher takes a layer's spec apart and has it put together again, which costs a small layer half of its time, and one
whose code has left the processor's caches 0.1 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bidensify.deploy.backends import choose_backend
from bidensify.deploy.between.deferred import Deferred
from bidensify.deploy.between.mode import only_deferring
from bidensify.deploy.run import Repeated
from bidensify.deploy.spec import PackedSpec

__all__ = ["again", "direct", "from_parts"]


def unwatched() -> bool:
    """Whether no mode, transform, tracer or profiler of anybody's would see an operator that is called now."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or not only_deferring()
    )


def _bare(x: Tensor) -> bool:
    """Whether the operator may run on ``x`` without torch's dispatcher: nothing could tell the difference."""
    return x.is_cpu and not (torch.is_grad_enabled() and x.requires_grad)


def again(x: Tensor, tiles: Tensor, side: Tensor, kernel: str, repeated: Repeated) -> Tensor | None:
    """The operator on an input as an earlier call's, nothing of which is looked at once more; or None.

    Args:
        x: the layer's input as it stands.
    """
    if type(x) is not Tensor or not unwatched():
        return None
    # Under the mode of a packed network each look at a property costs as much as a small operation.
    with torch._C.DisableTorchFunction():
        tier = choose_backend(kernel).tier
        return None if tier is None or not _bare(x) else repeated.call(tier, x, tiles, side)


def direct(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: PackedSpec,
    kernel: str,
    repeated: Repeated | None = None,
    given: Tensor | None = None,
) -> Tensor | None:
    """The operator without torch's dispatcher, or None where something could tell the difference.

    Args:
        repeated: where the call is kept, for ``again``.
        given: x as the layer was given it, where that differs.
    """
    if type(x) is not Tensor or not unwatched():
        return None
    with torch._C.DisableTorchFunction():
        backend = choose_backend(kernel)
        if not _bare(x) or backend.run is None or x.dtype not in backend.dtypes:
            return None
        y = backend.run(x, tiles, side, spec)
        if backend.tier is not None and repeated is not None:
            repeated.keep(backend.tier, x if given is None else given, tiles, side, spec)
        return y


def from_parts(x: Deferred, tiles: Tensor, side: Tensor, spec: PackedSpec, kernel: str) -> Tensor | None:
    """The operator on an input that was never made, or None where its backend needs it whole."""
    backend = choose_backend(kernel)
    if backend.run is None or x.dtype not in backend.dtypes or x.parts is None:
        return None
    with torch._C.DisableTorchFunction():
        y = backend.run(x, tiles, side, spec, parts=x.parts)
    x.consumed = True
    return y
