"""Each layer of a network: by itself in float with its norm and activation and packed, and inside the network in int8."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bidensify._util.machine import cpu_name
from bidensify.bench.int8 import installed_runtimes, openvino_layer_times, quantize_int8
from bidensify.bench.timing import interleave
from bidensify.bench.timing import threads as torch_threads
from bidensify.deploy.layers import packed_layers
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.plan.schema import Plan
from bidensify.rewrite.plan.times import Times, geometry

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["layer_times", "times_table"]

_INT8 = "openvino int8"


def layer_times(
    network: nn.Module,
    packed: nn.Module,
    plan: Plan,
    x: Tensor,
    *,
    threads: Sequence[int] = (1,),
    int8: bool = False,
    seconds: float = 0.2,
) -> list[tuple[LayerPlan, Times]]:
    """Times every layer that is packed on the input that it has in the network; layers of one geometry and size once.

    Args:
        network: in full precision.
        packed: the same network, packed.
        plan: of its rewrite.
        x: an image.
        threads: each measured by itself.
        int8: what a layer takes inside the network in OpenVINO's int8 too, where it is installed; of layers of one geometry
            and size the mean.
        seconds: per layer and number of threads, both variants together.
    """
    layers, inputs = packed_layers(packed), _inputs(packed, x)
    inside = _inside_int8(network, x, threads) if int8 and _INT8 in installed_runtimes() else {}
    measured: dict[tuple[Any, ...], Times] = {}
    result = []
    for layer in plan.binary:
        given = inputs.get(layer.path)
        if given is None or layer.path not in layers:
            continue
        call = layers[layer.path]
        for number in threads:
            output = tuple(call(given).shape[1:-1] if layer.kind == "linear" else call(given).shape[2:])
            place = (geometry(layer), output, number)
            if place not in measured:
                with torch_threads(number), torch.inference_mode():
                    calls: dict[str, Callable[[], Any]] = {
                        "float": partial(_float(network, layer), given),
                        "packed": partial(call, given),
                    }
                    timing = interleave(calls, seconds=seconds, least=3)
                ms = dict(timing.milliseconds)
                if (
                    quantized := inside.get(number, {}).get((geometry(replace(layer, act_bits=1)), output))
                ) is not None:
                    ms[_INT8] = quantized
                measured[place] = Times(place[0], output, number, ms, cpu_name())
            result.append((layer, measured[place]))
    return result


def _inside_int8(
    network: nn.Module, x: Tensor, threads: Sequence[int]
) -> dict[int, dict[tuple[str, tuple[int, ...]], float]]:
    """Number of threads -> geometry and output -> what such a layer takes in the whole network in int8."""
    with tempfile.TemporaryDirectory() as folder:
        file = quantize_int8(_INT8, network, x, Path(folder))
        return {number: openvino_layer_times(file, x, number) for number in threads}


def _float(network: nn.Module, layer: LayerPlan) -> nn.Module:
    """The layer with the norm that its binary form absorbs and, where that has an activation, a ReLU."""
    parts = [network.get_submodule(layer.path)]
    if layer.norm is not None:
        parts.append(network.get_submodule(layer.norm))
    if layer.activation:
        parts.append(nn.ReLU())
    return nn.Sequential(*parts).eval()


def _inputs(packed: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Path -> what the packed layer reads at its first call."""
    found: dict[str, Tensor] = {}

    def listen(path: str) -> Callable[[nn.Module, Any], None]:
        def keep(module: nn.Module, args: Any) -> None:
            # A plain copy: what comes in may be a concatenation that was never made.
            found.setdefault(path, torch.empty_like(args[0]).copy_(args[0]))

        return keep

    hooks = [layer.register_forward_pre_hook(listen(path)) for path, layer in packed_layers(packed).items()]
    try:
        with torch.no_grad():
            packed(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def times_table(rows: Sequence[tuple[LayerPlan, Times]]) -> Table:
    """A rich table, what saves least first."""
    from rich.table import Table
    from rich.text import Text

    total = sum(times.saved for _, times in rows)
    table = Table(title=f"{len(rows)} layers on {cpu_name()}, {total:.1f} ms saved in all")
    keys = list(dict.fromkeys(key for _, times in rows for key in times.ms))
    for column in ("layer", "shape", "output", "threads", *(f"{key} ms" for key in keys), "saved ms"):
        table.add_column(column, justify="left" if column in ("layer", "shape") else "right", overflow="fold")
    for layer, times in sorted(rows, key=lambda row: row[1].saved):
        cells = [layer.path, layer.shape, "×".join(map(str, times.output)), str(times.threads)]
        cells += [f"{times.ms[key]:.3f}" if key in times.ms else "" for key in keys]
        style = "yellow" if times.saved < 0 else None
        table.add_row(*map(Text, cast(list[str], [*cells, f"{times.saved:.3f}"])), style=style)
    return table
