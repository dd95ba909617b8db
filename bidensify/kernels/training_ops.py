"""``torch.library`` operators over the training kernels, so that dispatch modes (fake tensors, tracing) see them.

Each works on dense tensors (``dense.geometry``). Parameters are float32. ``out`` may be ``grad`` itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bidensify.kernels import structures
from bidensify.kernels.dense import Geometry, dense, geometry
from bidensify.kernels.library import call

__all__ = [
    "SCALES",
    "TWO_PLANES",
    "dab",
    "dab_again",
    "dab_backward",
    "dab_statistics",
    "moments",
    "post",
    "post_backward",
    "post_into",
    "weight",
    "weight_again",
    "weight_backward",
]

SCALES = {"per_tensor": 0, "per_channel": 1, "none": 2}
# Added to one of them: alpha is the step of two bit planes.
TWO_PLANES = 4

_SCHEMAS = (
    "dab_statistics(Tensor x, Tensor k, Tensor b, Tensor a, int scale, int dim) -> Tensor",
    "dab(Tensor x, Tensor k, Tensor b, Tensor a, int scale, int groups, int dim, bool signs=True) -> (Tensor, Tensor, Tensor)",
    "dab_again(Tensor x, Tensor statistics, int scale, int dim) -> Tensor",
    "dab_backward(Tensor grad, Tensor? grad_fused, Tensor x, Tensor statistics, int scale, int dim, Tensor(a!) out) "
    "-> Tensor",
    "moments(Tensor x, int dim) -> Tensor",
    "post(Tensor x, Tensor? bypass, Tensor? mean, Tensor? variance, Tensor? weight, Tensor? bias, Tensor? bias_in, "
    "Tensor? slope, Tensor? bias_out, float eps, int dim) -> Tensor",
    "post_backward(Tensor grad, Tensor x, Tensor? bypass, Tensor? mean, Tensor? variance, Tensor? weight, Tensor? bias, "
    "Tensor? bias_in, Tensor? slope, Tensor? bias_out, float eps, int dim, bool bypass_grad) -> (Tensor, Tensor, Tensor)",
    "weight(Tensor w, bool measure) -> (Tensor, Tensor)",
    "weight_again(Tensor w, Tensor scale) -> Tensor",
    "weight_backward(Tensor grad, Tensor w, Tensor scale, Tensor(a!) out) -> ()",
)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _geometry(x: Tensor, dim: int) -> Geometry:
    found = geometry(x, dim)
    if found is None:
        raise ValueError(f"training kernels take dense tensors, not shape {tuple(x.shape)} with strides {x.stride()}")
    return found


def _statistics_arguments(statistics: Tensor) -> tuple[int, int, int, int]:
    """Pointers to mean, beta, distance and alpha, the four rows of ``statistics``."""
    first, step = statistics.data_ptr(), statistics.stride(0) * 4
    return first, first + step, first + 2 * step, first + 3 * step


def _grouped(x: Tensor, groups: int, dim: int, last: bool) -> Tensor:
    if dim == -1:
        return x.new_empty(*x.shape[:-1], groups)
    shape = (x.shape[0], groups, *x.shape[2:])
    if last:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return x.new_empty(shape)


def _dab_statistics(x: Tensor, k: Tensor, b: Tensor, a: Tensor, scale: int, dim: int) -> Tensor:
    g = _geometry(x, dim)
    statistics = x.new_empty((4, g.n, g.c), dtype=torch.float32)
    arguments = structures.Dab(
        scale, 0, x.data_ptr(), k.data_ptr(), b.data_ptr(), a.data_ptr(), *_statistics_arguments(statistics), None, None
    )
    call("bdt_dab_forward", ctypes.byref(g.shape(x)), ctypes.byref(arguments))
    return statistics


def _signs(x: Tensor, signs: bool) -> Tensor:
    """Room for the binarized input, or one element that stands for all of them."""
    return torch.empty_like(x) if signs else x.new_empty(()).expand(x.shape)


def _dab(
    x: Tensor, k: Tensor, b: Tensor, a: Tensor, scale: int, groups: int, dim: int, signs: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    g = _geometry(x, dim)
    statistics = x.new_empty((4, g.n, g.c), dtype=torch.float32)
    y = _signs(x, signs)
    fused = _grouped(x, groups, dim, g.last) if groups else x.new_empty(0)
    arguments = structures.Dab(
        scale,
        groups,
        x.data_ptr(),
        k.data_ptr(),
        b.data_ptr(),
        a.data_ptr(),
        *_statistics_arguments(statistics),
        y.data_ptr() if signs else None,
        fused.data_ptr() if groups else None,
    )
    call("bdt_dab_forward", ctypes.byref(g.shape(x)), ctypes.byref(arguments))
    return y, fused, statistics


def _dab_again(x: Tensor, statistics: Tensor, scale: int, dim: int) -> Tensor:
    g = _geometry(x, dim)
    y = torch.empty_like(x)
    arguments = structures.Dab(
        scale, 0, x.data_ptr(), None, None, None, *_statistics_arguments(statistics), y.data_ptr(), None
    )
    call("bdt_dab_again", ctypes.byref(g.shape(x)), ctypes.byref(arguments))
    return y


def _dab_backward(
    grad: Tensor, grad_fused: Tensor | None, x: Tensor, statistics: Tensor, scale: int, dim: int, out: Tensor
) -> Tensor:
    g = _geometry(x, dim)
    parameters = x.new_empty(2 * g.c + 1, dtype=torch.float32)
    first = parameters.data_ptr()
    arguments = structures.DabGrad(
        scale,
        0 if grad_fused is None else grad_fused.shape[dim],
        x.data_ptr(),
        grad.data_ptr(),
        _pointer(grad_fused),
        *_statistics_arguments(statistics),
        out.data_ptr(),
        first,
        first + 4 * g.c,
        first + 8 * g.c,
    )
    call("bdt_dab_backward", ctypes.byref(g.shape(x)), ctypes.byref(arguments))
    return parameters


def _moments(x: Tensor, dim: int) -> Tensor:
    g = _geometry(x, dim)
    result = x.new_empty((2, g.c), dtype=torch.float32)
    call("bdt_moments", ctypes.byref(g.shape(x)), x.data_ptr(), result.data_ptr(), result.data_ptr() + 4 * g.c)
    return result


def _post(x: Tensor, *parts: Any) -> Tensor:
    x = dense(x, parts[-1])
    return post_into(torch.empty_like(x), x, *parts)


def post_into(
    y: Tensor,
    x: Tensor,
    bypass: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_in: Tensor | None,
    slope: Tensor | None,
    bias_out: Tensor | None,
    eps: float,
    dim: int,
) -> Tensor:
    """``post``, written to ``y``, which is of the shape, strides and dtype of ``x``; returns ``y``."""
    tensors = (x, bypass, mean, variance, weight, bias, bias_in, slope, bias_out, y)
    arguments = structures.Post(eps, *map(_pointer, tensors))
    call("bdt_post_forward", ctypes.byref(_geometry(x, dim).shape(x)), ctypes.byref(arguments))
    return y


def _post_backward(
    grad: Tensor,
    x: Tensor,
    bypass: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_in: Tensor | None,
    slope: Tensor | None,
    bias_out: Tensor | None,
    eps: float,
    dim: int,
    bypass_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    g = _geometry(x, dim)
    grad_x = torch.empty_like(x)
    grad_bypass = torch.empty_like(x) if bypass_grad else x.new_empty(0)
    parameters = x.new_empty((5, g.c), dtype=torch.float32)
    rows = [parameters.data_ptr() + 4 * g.c * i for i in range(5)]
    parts = (x, bypass, mean, variance, weight, bias, bias_in, slope, bias_out, None)
    arguments = structures.PostGrad(
        structures.Post(eps, *map(_pointer, parts)),
        grad.data_ptr(),
        grad_x.data_ptr(),
        grad_bypass.data_ptr() if bypass_grad else None,
        *rows,
    )
    call("bdt_post_backward", ctypes.byref(g.shape(x)), ctypes.byref(arguments))
    return grad_x, grad_bypass, parameters


def _weight_into(y: Tensor, w: Tensor, scale: Tensor, measure: bool) -> Tensor:
    rows = w.shape[0]
    pointers = w.data_ptr(), measure, scale.data_ptr(), y.data_ptr()
    call("bdt_weight_forward", rows, w.numel() // rows, torch.get_num_threads(), *pointers)
    return y


def _weight(w: Tensor, measure: bool) -> tuple[Tensor, Tensor]:
    scale = w.new_empty(w.shape[0]) if measure else w.new_ones(w.shape[0])
    return _weight_into(torch.empty_like(w), w, scale, measure), scale


def _weight_again(w: Tensor, scale: Tensor) -> Tensor:
    return _weight_into(torch.empty_like(w), w, scale, False)


def _weight_backward(grad: Tensor, w: Tensor, scale: Tensor, out: Tensor) -> None:
    rows = w.shape[0]
    pointers = w.data_ptr(), scale.data_ptr(), grad.data_ptr(), out.data_ptr()
    call("bdt_weight_backward", rows, w.numel() // rows, torch.get_num_threads(), *pointers)


def _fake_dab(
    x: Tensor, k: Tensor, b: Tensor, a: Tensor, scale: int, groups: int, dim: int, signs: bool = True
) -> tuple[Tensor, ...]:
    fused = _grouped(x, groups, dim, not x.is_contiguous()) if groups else x.new_empty(0)
    return _signs(x, signs), fused, x.new_empty((4, x.shape[0], x.shape[dim]), dtype=torch.float32)


_LIBRARY: Any = torch.library.Library("bidensify", "FRAGMENT")  # type: ignore[no-untyped-call]
_CPU: dict[str, Callable[..., Any]] = {
    "dab_statistics": _dab_statistics,
    "dab": _dab,
    "dab_again": _dab_again,
    "dab_backward": _dab_backward,
    "moments": _moments,
    "post": _post,
    "post_backward": _post_backward,
    "weight": _weight,
    "weight_again": _weight_again,
    "weight_backward": _weight_backward,
}
_FAKE: dict[str, Callable[..., Any]] = {
    "dab_statistics": lambda x, k, b, a, scale, dim: x.new_empty((4, x.shape[0], x.shape[dim]), dtype=torch.float32),
    "dab": _fake_dab,
    "dab_again": lambda x, statistics, scale, dim: torch.empty_like(x),
    "dab_backward": lambda grad, grad_fused, x, statistics, scale, dim, out: x.new_empty(
        2 * x.shape[dim] + 1, dtype=torch.float32
    ),
    "moments": lambda x, dim: x.new_empty((2, x.shape[dim]), dtype=torch.float32),
    "post": lambda x, *rest: torch.empty_like(x),
    "post_backward": lambda grad, x, *rest: (
        torch.empty_like(x),
        torch.empty_like(x) if rest[-1] else x.new_empty(0),
        x.new_empty((5, x.shape[rest[-2]]), dtype=torch.float32),
    ),
    "weight": lambda w, measure: (torch.empty_like(w), w.new_empty(w.shape[0])),
    "weight_again": lambda w, scale: torch.empty_like(w),
    "weight_backward": lambda grad, w, scale, out: None,
}
for _schema in _SCHEMAS:
    _name = _schema[: _schema.index("(")]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _CPU[_name], "CPU")
    torch.library.register_fake(f"bidensify::{_name}", _FAKE[_name], lib=_LIBRARY)

dab_statistics = torch.ops.bidensify.dab_statistics.default
dab = torch.ops.bidensify.dab.default
dab_again = torch.ops.bidensify.dab_again.default
dab_backward = torch.ops.bidensify.dab_backward.default
moments = torch.ops.bidensify.moments.default
post = torch.ops.bidensify.post.default
post_backward = torch.ops.bidensify.post_backward.default
weight = torch.ops.bidensify.weight.default
weight_again = torch.ops.bidensify.weight_again.default
weight_backward = torch.ops.bidensify.weight_backward.default
