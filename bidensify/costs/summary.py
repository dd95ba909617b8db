"""Parameters, bits, bytes and operations of a network, per layer and in total, as the literature counts them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bidensify._util.wrappers import unwrap
from bidensify.costs import work
from bidensify.costs.held import held
from bidensify.costs.rows import LayerSummary, Summary
from bidensify.errors import ConfigError, PlanError
from bidensify.nn import BinaryLayer, FrozenLayer, Int8Layer
from bidensify.rewrite.macs import macs_of
from bidensify.rewrite.plan.schema import Plan
from bidensify.rewrite.record.recorder import record

# Of a tensor in the table that a safetensors file begins with, its name left out.
_ENTRY = 62

__all__ = ["LayerSummary", "Summary", "summary"]


def summary(model: nn.Module, input_size: Sequence[int]) -> Summary:
    """Counts parameters and operations of a float, latent or packed network.

    OPs = full-precision MACs · 2 + int8 MACs · 2 / 4 + binary MACs · 2 / 64 · bits of an activation + elementwise work; Params =
    full-precision + int8 / 4 + binary / 32. The literature has no figure for int8; four of its values take the place of one
    float32, in memory and in a vector register. Elementwise work per element: a binarizer 4 with statistics and 1 without, 2
    more for a second bit, int8's rounding 2, scale and bias 2, a norm 2, a bypass 1, RPReLU 3, every other function or module 1,
    what only moves data 0.

    Args:
        model: the network; it is left as it was.
        input_size: (C, H, W) of one sample or (N, C, H, W); counts are per sample.

    Raises:
        ConfigError: ``input_size`` is no such size.
        PlanError: ``model`` is no network, or does not run on such an input.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"summary: {type(model).__name__} is no nn.Module; give the network")
    model = unwrap(model)
    size = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if len(size) not in (3, 4) or not all(isinstance(n, int) and n > 0 for n in size):
        raise ConfigError(
            f"summary: input_size={input_size!r} must be positive integers, (C, H, W) of one sample or (N, C, H, W)"
        )
    if len(size) == 3:
        size = (2, *size)
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    run = record(model, torch.zeros(size, dtype=reference.dtype, device=reference.device))
    calls = work.calls_of(run)
    functions, uncounted = work.functions_of(run)
    rows: list[LayerSummary] = []
    inside: tuple[str, ...] = ()
    latent: dict[str, BinaryLayer] = {}
    states = {"FLOAT"}
    plan = getattr(model, "bidensify_plan", None)
    reasons = {layer.path: layer.reason for layer in plan.kept} if isinstance(plan, Plan) else {}
    for path, module in run.modules.items():
        if path.startswith(inside):
            continue
        frozen = isinstance(module, FrozenLayer)
        kind = type(module).__name__
        if isinstance(module, BinaryLayer) or frozen:
            inside = (*inside, path + ".")
            if isinstance(module, BinaryLayer):
                latent[path] = module
            row = _latent(module, calls[path]) if isinstance(module, BinaryLayer) else _packed(module, calls[path])
            states.add("LATENT" if isinstance(module, BinaryLayer) else "PACKED")
            bits = module.binarizer.planes if isinstance(module, BinaryLayer) else module.counts().act_bits  # type: ignore[operator]
            rows.append(LayerSummary(path, kind, *row, output=_output(calls[path]), act_bits=bits))
            continue
        if isinstance(module, Int8Layer):
            inside = (*inside, path + ".")
            rows.append(_rounded(path, module, calls[path], reasons.get(path, "")))
            continue
        own = sum(p.numel() for p in module._parameters.values() if p is not None)
        done = sum((work.layer_work(module, call) for call in calls[path]), functions.get(path, work.Work()))
        if own or done.macs or done.elements or (calls[path] and not isinstance(module, nn.Identity)):
            rows.append(
                LayerSummary(
                    path or "(model)", kind, 0, own, 0, done.macs, done.elements, _output(calls[path]),
                    reasons.get(path, ""), product_macs=done.products,
                )
            )  # fmt: skip
    state = "PACKED" if "PACKED" in states else "LATENT" if "LATENT" in states else "FLOAT"
    return Summary(tuple(rows), state, size[1:], uncounted, _file_bytes(model, latent))


def _output(calls: Sequence[work.LayerCall]) -> tuple[int, ...]:
    """The largest output of one sample over a layer's calls."""
    return max((call.output[1:] for call in calls), key=math.prod, default=())


def _file_bytes(model: nn.Module, latent: Mapping[str, BinaryLayer]) -> int:
    """What the tensors of the network weigh in their file once it is packed, with the file's own table of names."""
    inside = tuple(f"{path}." for path in latent)
    saved = {name: value for name, value in model.state_dict(keep_vars=True).items() if not name.startswith(inside)}
    tensors = {id(value): (name, value.numel() * value.element_size()) for name, value in saved.items()}
    entries = list(tensors.values())
    for path, layer in latent.items():
        entries += [(f"{path}.{name}", size) for name, size in held(layer).tensors.items()]
    return 8 + int(sum(size + _ENTRY + len(name) for name, size in entries))


def _latent(layer: BinaryLayer, calls: Sequence[work.LayerCall]) -> tuple[int, int, int, int, int]:
    """(binary parameters, float parameters, binary MACs, float MACs, elementwise): parameters as they are trained, the
    rest as the packed layer will have it."""
    weights = layer.latent_weight.numel()
    floats = sum(p.numel() for p in layer.parameters()) - weights
    if layer.weight_binarizer.scaled:
        floats += len(layer.weight_binarizer.rows(layer.latent_weight))
    macs = sum(macs_of(layer, call.output) for call in calls)
    before, after = held(layer).work
    elements = sum(work.numel(call.input) * before + work.numel(call.output) * after for call in calls)
    return weights, floats, macs, 0, elements


def _rounded(path: str, layer: Any, calls: Sequence[work.LayerCall], kept: str) -> LayerSummary:
    """An int8 layer: 8 bits a weight; in float a step per output channel, the input's range and the bias."""
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return LayerSummary(
        path,
        type(layer).__name__,
        binary_params=0,
        float_params=channels + 2 + (0 if layer.bias is None else layer.bias.numel()),
        binary_macs=0,
        float_macs=0,
        elementwise=sum(2 * work.numel(call.input) for call in calls),
        output=_output(calls),
        kept=kept,
        int8_params=layer.weight.numel(),
        int8_macs=sum(macs_of(layer, call.output) for call in calls),
    )


def _packed(layer: Any, calls: Sequence[work.LayerCall]) -> tuple[int, int, int, int, int]:
    facts = layer.counts()
    floats = facts.float_params + sum(p.numel() for p in layer.parameters())
    macs = sum(round(facts.macs_per_output * work.numel(call.output)) for call in calls)
    elements = sum(
        work.numel(call.input) * facts.work_per_input + work.numel(call.output) * facts.work_per_output
        for call in calls
    )
    return facts.binary_params, floats, macs, 0, elements
