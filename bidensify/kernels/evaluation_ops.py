"""``torch.library`` operators over the kernels of evaluation: ``bidensify.exact`` on dense channels-last tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bidensify.kernels import structures
from bidensify.kernels.dense import supports
from bidensify.kernels.library import call

__all__ = ["codes", "evaluates", "finish", "signs"]

_SCHEMAS = (
    "eval_codes(Tensor x, Tensor k, Tensor b, Tensor? a, int planes) -> (Tensor, Tensor)",
    "eval_finish(Tensor dot, Tensor? half, Tensor? extra, Tensor scale, Tensor bias, Tensor? slope, Tensor? post, "
    "Tensor(a!) out) -> ()",
    "eval_signs(Tensor weight) -> (Tensor, Tensor)",
)


def evaluates(x: Tensor) -> bool:
    """Whether the kernels take ``x`` (N, C, H, W): float32 or bfloat16 on the CPU, dense in channels_last."""
    return supports(x) and x.is_contiguous(memory_format=torch.channels_last)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _shape(x: Tensor, half: bool) -> structures.Shape:
    n, c, h, w = x.shape
    return structures.Shape(n, c, h * w, True, half, torch.get_num_threads())


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _codes(x: Tensor, k: Tensor, b: Tensor, a: Tensor | None, planes: int) -> tuple[Tensor, Tensor]:
    y = _like(x, torch.float32)
    beta = x.new_empty(x.shape[:2], dtype=torch.float32)
    alpha = x.new_empty(x.shape[0] if a is not None else 0, dtype=torch.float32)
    arguments = structures.Codes(planes, *map(_pointer, (x, k, b, a, beta, alpha, y)))
    call("bdt_eval_codes", ctypes.byref(_shape(x, x.dtype == torch.bfloat16)), ctypes.byref(arguments))
    return y, alpha


def _finish(
    dot: Tensor,
    half: Tensor | None,
    extra: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    slope: Tensor | None,
    post: Tensor | None,
    out: Tensor,
) -> None:
    arguments = structures.Finish(*map(_pointer, (dot, half, extra, scale, bias, slope, post, out)))
    call("bdt_eval_finish", ctypes.byref(_shape(dot, out.dtype == torch.bfloat16)), ctypes.byref(arguments))


def _signs(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.shape[0]
    y, scale = torch.empty_like(weight), weight.new_empty(rows)
    arguments = (rows, weight.numel() // rows, torch.get_num_threads(), *map(_pointer, (weight, scale, y)))
    call("bdt_eval_signs", *arguments)
    return y, scale


_CPU: dict[str, Callable[..., Any]] = {"eval_codes": _codes, "eval_finish": _finish, "eval_signs": _signs}
_FAKE: dict[str, Callable[..., Any]] = {
    "eval_codes": lambda x, k, b, a, planes: (
        _like(x, torch.float32),
        x.new_empty(x.shape[0] if a is not None else 0, dtype=torch.float32),
    ),
    "eval_finish": lambda *arguments: None,
    "eval_signs": lambda weight: (torch.empty_like(weight), weight.new_empty(weight.shape[0])),
}
_LIBRARY: Any = torch.library.Library("bidensify", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _name = _schema[: _schema.index("(")]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _CPU[_name], "CPU")
    torch.library.register_fake(f"bidensify::{_name}", _FAKE[_name], lib=_LIBRARY)

codes = torch.ops.bidensify.eval_codes.default
finish = torch.ops.bidensify.eval_finish.default
signs = torch.ops.bidensify.eval_signs.default
