"""A layer or a network in every form that is timed: float, latent, and packed for each kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.bench.cases import Case
from bidensify.config import BidensifyConfig
from bidensify.deploy.freeze import freeze
from bidensify.deploy.layers import packed_layers
from bidensify.deploy.pack import pack, set_float_dtype, set_kernel
from bidensify.rewrite.api import bidensify
from bidensify.rewrite.record.channels import image_channels

__all__ = ["Variants", "packed_variant", "variants"]


@dataclass
class Variants:
    """A case with everything that is timed of it."""

    title: str
    target: float | None
    floats: nn.Module
    x: Tensor
    calls: dict[str, Callable[[], Any]]
    modules: dict[str, nn.Module] = field(default_factory=dict)


def variants(
    network: nn.Module | None,
    student: nn.Module | None,
    name: str,
    cases: Sequence[Case],
    size: tuple[int, int],
    kernels: Sequence[str],
    latent: bool,
    bfloat16: bool,
    act_bits: Sequence[int] = (1,),
) -> list[Variants]:
    """Makes a network's variants, or those of single layers where there is none; see ``run_bench``."""
    if network is None:
        return [_layer(case, kernels, latent, bfloat16, act_bits) for case in cases]
    floats = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    image = (image_channels(network), *size)
    if student is None:
        student = bidensify(copy.deepcopy(network).eval(), BidensifyConfig(act_bits=act_bits[0])).eval()
    modules: dict[str, nn.Module] = {"float": floats}
    if latent:
        modules["latent"] = student
    for kernel in kernels:
        modules[kernel] = packed_variant(student, kernel, None)
    if bfloat16:
        for kernel in kernels:
            modules[f"{kernel} bfloat16"] = packed_variant(student, kernel, torch.bfloat16)
    x = torch.randn(1, *image).contiguous(memory_format=torch.channels_last)
    return [Variants(name, None, floats, x, {key: partial(module, x) for key, module in modules.items()}, modules)]


def packed_variant(student: nn.Module, kernel: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Returns a student, latent or packed already, as packed layers on ``kernel`` with the rest in ``dtype``."""
    if not packed_layers(student):
        return pack(student, kernel=kernel, float_dtype=dtype)
    packed = set_kernel(copy.deepcopy(student), kernel)
    return packed if dtype is None else set_float_dtype(packed, dtype)


def _layer(case: Case, kernels: Sequence[str], latent: bool, bfloat16: bool, act_bits: Sequence[int]) -> Variants:
    floats = case.build()[0]
    x = case.input()
    calls: dict[str, Callable[[], Any]] = {"float": partial(floats, x)}
    for bits in act_bits:
        layer = case.build(bits)[1]
        name = " 2 bits" if bits == 2 else ""
        if latent:
            calls[f"latent{name}"] = partial(layer, x)
        for kernel in kernels:
            packed = freeze(layer, kernel)  # type: ignore[arg-type]
            calls[kernel + name] = partial(packed, x)
            if bfloat16:
                calls[f"{kernel} bfloat16{name}"] = partial(packed, x.to(torch.bfloat16))
    return Variants(case.name, case.target, floats, x, calls)
