"""Each layer of a network by itself: in float with its norm and activation, packed, and quantized to int8."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bidensify._util.machine import cpu_name
from bidensify.bench.int8 import installed_runtimes, open_int8, quantize_int8
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
        int8: OpenVINO int8 too, where it is installed (quantizing takes seconds a layer).
        seconds: per layer and number of threads, all variants together.
    """
    layers, inputs = packed_layers(packed), _inputs(packed, x)
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
                    calls = _calls(_float(network, layer), call, given, number, int8)
                    timing = interleave(calls, seconds=seconds, least=3)
                measured[place] = Times(place[0], output, number, timing.milliseconds, cpu_name())
            result.append((layer, measured[place]))
    return result


def _calls(floats: nn.Module, packed: nn.Module, x: Tensor, number: int, int8: bool) -> dict[str, Callable[[], Any]]:
    calls: dict[str, Callable[[], Any]] = {"float": partial(floats, x), "packed": partial(packed, x)}
    if int8 and _INT8 in installed_runtimes():
        with tempfile.TemporaryDirectory() as folder:
            calls[_INT8] = open_int8(_INT8, quantize_int8(_INT8, floats, x, Path(folder)), x, number)
    return calls


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
