"""The ``torch.library`` operator behind packed layers: one name over the native kernels, the reference and ExecuTorch.

    bidensify::packed_layer(Tensor[] parts, int[] up, Tensor tiles, Tensor side, int[] spec, Tensor? thresholds,
                            Tensor? levels, Tensor? residual) -> Tensor          and packed_layer.out

The schema is frozen: programs of ``torch.export`` and of ExecuTorch (``deploy/executorch``) hold it. What a later release adds
to a layer goes into ``spec``, whose first integer is a version; which kernel runs is the running machine's business.

* ``parts``, ``up``: the input's channels in order, part i (N, C_i, H / up_i, W / up_i) with each pixel standing for up_i x up_i
  (nearest-neighbour upsampling); of a linear layer one part (N, ..., C_in) as it stands. A spec of version 2 may say that parts
  are (N, H / up_i, W / up_i, C_i), and that the result with its residual is (N, H', W', C').
* ``tiles``, ``side``: the layer's bits and side parameters. The rest: see ``packed_reference``; of a linear layer ``residual``
  has the output's shape (N, ..., C_out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from bidensify.deploy.backends import choose_backend
from bidensify.deploy.between.deferred import Part
from bidensify.deploy.reference import from_tokens, packed_reference, tokens, whole
from bidensify.deploy.run import Repeated
from bidensify.deploy.spec import PackedSpec
from bidensify.errors import ConfigError, FormatError

__all__ = [
    "PARTS_INNER", "RESULT_INNER", "SPEC_VERSION", "reference_operator", "run_operator", "spec_ints",
]  # fmt: skip

# Of the integers that say what a layer is: 1 and the layer's fields, or 2, where channels are the last dimension, and the fields.
# A newer version than the program that runs knows is refused.
SPEC_VERSION = 2
# The parts, the result as (N, H, W, C). To a runtime that calls memory by the order of dimensions, that is how an image in
# channels_last is tokens (N, H * W, C) without a copy.
PARTS_INNER, RESULT_INNER = 1, 2
_SCHEMA = "(Tensor[] parts, int[] up, Tensor tiles, Tensor side, int[] spec, Tensor? thresholds, Tensor? levels, Tensor? residual"
_OLD_SCHEMA = (
    "packed_conv2d(Tensor x, Tensor tiles, Tensor side, int[] spec, Tensor? thresholds, Tensor? levels, "
    "Tensor? residual, str kernel) -> Tensor"
)
# The kernel that the layer at work asks for: no program that is written down holds it.
_kernel: ContextVar[str] = ContextVar("kernel", default="auto")
# Of layers that a compiled network or a program calls, by all that tells one from another: what was looked at once.
_repeated: dict[Any, Repeated] = {}
_MOST_REPEATED = 4096


def spec_ints(spec: PackedSpec, inner: int = 0) -> list[int]:
    """A layer as the operator takes it, in the oldest version that can say it.

    Args:
        inner: ``PARTS_INNER``, ``RESULT_INNER``, both or neither.
    """
    return [2, inner, *spec.to_ints()] if inner else [1, *spec.to_ints()]


def _spec_of(ints: Sequence[int]) -> PackedSpec:
    if not ints or not 1 <= ints[0] <= SPEC_VERSION:
        raise FormatError(
            f"packed_layer: a layer of version {ints[0] if ints else 'none'}; this bidensify runs 1 to {SPEC_VERSION}: "
            "install a newer one"
        )
    return PackedSpec.from_ints(ints[1:] if ints[0] == 1 else ints[2:])


def _has_inner(ints: Sequence[int]) -> bool:
    return len(ints) > 0 and ints[0] == 2


def _as_images(run: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A call of version 2 as one of version 1: turned images are views."""
    parts, up, tiles, side, spec, thresholds, levels, residual = arguments
    layer, inner = _spec_of(spec), spec[1] if len(spec) > 1 else -1
    if not 0 <= inner <= (PARTS_INNER | RESULT_INNER) or layer.kind == "linear":
        raise FormatError(f"packed_layer: {inner} does not say where the channels of a layer of kind {layer.kind} are")

    def image(x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ConfigError(f"packed_layer: {tuple(x.shape)} must be (N, H, W, C), as the layer's spec says")
        return x.permute(0, 3, 1, 2)

    if inner & PARTS_INNER:
        parts = [image(part) for part in parts]
    if not inner & RESULT_INNER:
        return run(parts, up, tiles, side, spec_ints(layer), thresholds, levels, residual)
    y = run(parts, up, tiles, side, spec_ints(layer), thresholds, levels, None if residual is None else image(residual))
    return y.permute(0, 2, 3, 1).contiguous()


def _check_parts(parts: Sequence[Tensor], up: Sequence[int], spec: PackedSpec) -> None:
    shapes = [tuple(x.shape) for x in parts]
    if not parts or len(parts) != len(up) or min(up) < 1:
        raise ConfigError(f"packed_layer: parts of shapes {shapes} need one upsampling from 1 each, got {list(up)}")
    if spec.kind == "linear":
        good = len(parts) == 1 and up[0] == 1 and parts[0].dim() >= 2 and parts[0].shape[-1] == spec.in_channels
    else:
        good = all(x.dim() == 4 for x in parts) and sum(x.shape[1] for x in parts) == spec.in_channels
        good = good and len({(x.shape[0], x.shape[2] * u, x.shape[3] * u) for x, u in zip(parts, up)}) == 1
    if not good or any(x.dtype != parts[0].dtype or x.device != parts[0].device for x in parts):
        wanted = (
            f"(N, ..., {spec.in_channels})" if spec.kind == "linear" else f"{spec.in_channels} channels in all, 4-d"
        )
        raise ConfigError(
            f"packed_layer: parts of shapes {shapes}, upsampled {list(up)} times, must make up {wanted} of one dtype on one "
            "device"
        )


def reference_operator(
    parts: Sequence[Tensor],
    up: Sequence[int],
    tiles: Tensor,
    side: Tensor,
    spec: Sequence[int],
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The operator in plain PyTorch, channels_last: on devices without kernels, and as its decomposition for export."""
    if _has_inner(spec):
        return _as_images(reference_operator, parts, up, tiles, side, spec, thresholds, levels, residual)
    layer = _spec_of(spec)
    if layer.kind != "linear":
        return packed_reference(whole(parts, up), tiles, side, layer, thresholds, levels, residual)
    residual = None if residual is None else tokens(residual)
    y = packed_reference(tokens(parts[0]), tiles, side, layer, thresholds, levels, residual)
    return from_tokens(y, parts[0])


def _run_again(key: Any, x: Tensor, tiles: Tensor, side: Tensor) -> Tensor | None:
    """What a layer gives for an input as an earlier one, or None where no such call was kept."""
    found = _repeated.get(key)
    if found is None or not x.is_cpu:
        return None
    # A mode of the caller's has seen this operator; it need not see every size that is read here.
    with torch._C.DisableTorchFunction():
        tier = choose_backend(_kernel.get()).tier
        return None if tier is None else found.call(tier, x, tiles, side)


def _run(
    parts: Sequence[Tensor],
    up: Sequence[int],
    tiles: Tensor,
    side: Tensor,
    spec: Sequence[int],
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """What runs eagerly: the backend, or the reference where it does not take the input."""
    if _has_inner(spec):
        return _as_images(_run, parts, up, tiles, side, spec, thresholds, levels, residual)
    key = None
    if thresholds is None and levels is None and residual is None and len(parts) == len(up) == 1 and up[0] == 1:
        key = tuple(spec), *((w.data_ptr(), w.numel(), w.dtype, w.is_contiguous()) for w in (tiles, side))
        y = _run_again(key, parts[0], tiles, side)
        if y is not None:
            return y
    layer = _spec_of(spec)
    _check_parts(parts, up, layer)
    x = parts[0]
    if layer.kind == "linear" and not x.numel():
        return x.new_empty((*x.shape[:-1], layer.out_channels))
    backend = choose_backend(_kernel.get(), x.device.type)
    if backend.run is not None and x.dtype in backend.dtypes:
        # A mode of the caller's has seen this operator; it need not see every size that is read here.
        with torch._C.DisableTorchFunction():
            if layer.kind == "linear" or (len(parts) == 1 and up[0] == 1):
                if layer.kind == "linear":
                    residual = None if residual is None else tokens(residual)
                    y = from_tokens(backend.run(tokens(x), tiles, side, layer, thresholds, levels, residual), x)
                else:
                    y = backend.run(x, tiles, side, layer, thresholds, levels, residual)
                if key is not None and backend.tier is not None:
                    if len(_repeated) >= _MOST_REPEATED:
                        _repeated.clear()
                    _repeated.setdefault(key, Repeated()).keep(backend.tier, x, tiles, side, layer)
                return y
            dense = [Part(part.contiguous(memory_format=torch.channels_last), u) for part, u in zip(parts, up)]
            whole = x.new_empty(()).expand(x.shape[0], layer.in_channels, x.shape[2] * up[0], x.shape[3] * up[0])
            return backend.run(whole, tiles, side, layer, thresholds, levels, residual, parts=dense)
    for tensor in (tiles, side, thresholds, levels, residual):
        if tensor is not None and tensor.device != x.device:
            raise ConfigError(
                f"packed_layer: the input is on {x.device}, the layer or what it was given on {tensor.device}; bring "
                "both to one device"
            )
    # Autocast reaches the convolution inside, whose sums are no integers in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return reference_operator(parts, up, tiles, side, spec, thresholds, levels, residual)


def run_operator(
    kernel: str,
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    ints: list[int],
    thresholds: Tensor | None = None,
    levels: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The operator through torch's dispatcher, on one whole input. A program that is written down runs the best kernel."""
    arguments = ([x], [1], tiles, side, ints, thresholds, levels, residual)
    if kernel == "auto" or torch.compiler.is_compiling():
        y: Tensor = torch.ops.bidensify.packed_layer(*arguments)
        return y
    token = _kernel.set(kernel)
    try:
        y = torch.ops.bidensify.packed_layer(*arguments)
    finally:
        _kernel.reset(token)
    return y


def _fake(
    parts: Sequence[Tensor],
    up: Sequence[int],
    tiles: Tensor,
    side: Tensor,
    spec: Sequence[int],
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if _has_inner(spec):
        return _as_images(_fake, parts, up, tiles, side, spec, thresholds, levels, residual)
    layer, x = _spec_of(spec), parts[0]
    if layer.kind == "linear":
        return x.new_empty((*x.shape[:-1], layer.out_channels))
    height, width = layer.output_size(x.shape[2] * up[0], x.shape[3] * up[0])
    return torch.empty(
        (x.shape[0], layer.out_channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _run_out(*arguments: Any, out: Tensor) -> Tensor:
    return out.copy_(_run(*arguments))


def _old_arguments(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: Sequence[int],
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
) -> tuple[Any, ...]:
    """``packed_conv2d`` in terms of its successor: there a linear layer was the convolution of an image."""
    ints = [1, *spec]
    if PackedSpec.from_ints(spec).kind == "linear":
        ints[1] = 0
    return [x], [1], tiles, side, ints, thresholds, levels, residual


def _old(*arguments: Any) -> Tensor:
    token = _kernel.set(arguments[-1])
    try:
        return _run(*_old_arguments(*arguments[:-1]))
    finally:
        _kernel.reset(token)


_library: Any = torch.library.Library("bidensify", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"packed_layer{_SCHEMA}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"packed_layer.out{_SCHEMA}, *, Tensor(a!) out) -> Tensor(a!)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(_OLD_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CPU", "CUDA", "MPS", "XPU"):
    _library.impl("packed_layer", _run, _key)
    _library.impl("packed_layer.out", _run_out, _key)
    _library.impl("packed_conv2d", _old, _key)
torch.library.register_fake("bidensify::packed_layer", _fake, lib=_library)
torch.library.register_fake("bidensify::packed_layer.out", lambda *arguments, out: out, lib=_library)
torch.library.register_fake(
    "bidensify::packed_conv2d", lambda *arguments: _fake(*_old_arguments(*arguments[:-1])), lib=_library
)
