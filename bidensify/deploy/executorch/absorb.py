"""A packed layer takes a residual's sum, and the activation behind it, into its own last pass.

In PyTorch sums wait for their reader (``deploy/between``). Under ExecuTorch each addition, the activation and both its shifts
are passes over the whole image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from bidensify.deploy.executorch.constants import behind_views, constant, known, per_channel
from bidensify.deploy.operator import spec_ints
from bidensify.deploy.runtimes.nodes import same_size, valued
from bidensify.deploy.runtimes.prepare import of_images
from bidensify.deploy.runtimes.writes import Writes
from bidensify.deploy.spec import PackedSpec

__all__ = ["absorb_sums"]

_aten = torch.ops.aten
_PACKED = torch.ops.bidensify.packed_layer.default


def absorb_sums(program: torch.export.ExportedProgram) -> int:
    """Packed layers add what is added to their results, with a PReLU or ReLU and its shifts behind; returns how many do.

    The order of additions changes, and with it the last digits.
    """
    graph, changed = program.graph, 0
    for node in list(graph.nodes):
        if node.target is _aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            a, b = node.args
            changed += _absorbed(program, node, a, b) or _absorbed(program, node, b, a)
    graph.eliminate_dead_code()
    return changed


def _absorbed(program: torch.export.ExportedProgram, total: fx.Node, layer: Any, other: Any) -> bool:
    if (
        not isinstance(layer, fx.Node)
        or not isinstance(other, fx.Node)
        or layer.target is not _PACKED
        or other is layer
    ):
        return False
    arguments: list[Any] = list(layer.args)
    parts, ints, residual = arguments[0], arguments[4], arguments[7]
    side = known(program, arguments[3])
    if not of_images(ints) or residual is not None or side is None or len(layer.users) > 1:
        return False
    value, beside = layer.meta["val"], other.meta["val"]
    if not same_size(value, beside) or not value.dtype == beside.dtype == torch.float32:
        return False
    spec = PackedSpec.from_ints(ints[1:])
    if spec.slope or spec.rise or spec.clamp or spec.post or spec.bypass_last:
        return False
    taken, spec, side = _activated(program, total, spec, side)
    writes = Writes(program.graph)
    if writes.between([layer, *parts], layer, taken[-1]) or writes.between([other], total, taken[-1]):
        return False
    with program.graph.inserting_before(taken[-1]):
        arguments[3], arguments[4] = constant(program, f"{layer.name}_side", side), spec_ints(spec)
        arguments[7] = other
        made = valued(program.graph.call_function(_PACKED, tuple(arguments)))
    taken[-1].replace_all_uses_with(made)
    # What works in place is not taken for dead.
    for each in reversed(taken):
        program.graph.erase_node(each)
    return True


def _activated(
    program: torch.export.ExportedProgram, total: fx.Node, spec: PackedSpec, side: Tensor
) -> tuple[list[fx.Node], PackedSpec, Tensor]:
    """The sum and what the layer can take with it, in order; the layer then, and its parameters."""
    values = {name: side[start : start + length] for name, (start, length) in spec.layout.items()}
    taken, shift = _shifted(program, [total])
    last, activation = taken[-1], _reader(taken[-1])
    slope = None
    if activation is not None and activation.target in (_aten.relu.default, _aten.relu_.default):
        slope = torch.zeros(spec.out_channels)
    elif activation is not None and activation.target is _aten.prelu.default and activation.args[0] is last:
        slope = _slope(program, activation.args[1], spec.out_channels)
    values["bias"] = values["bias"] if shift is None else values["bias"] + shift
    if activation is not None and slope is not None:
        taken, post = _shifted(program, [*taken, activation])
        spec = dataclasses.replace(spec, slope=True, post=post is not None)
        values |= {"slope": slope} | ({} if post is None else {"post": post})
    return taken, spec, torch.cat([values[name] for name in spec.layout])


def _shifted(program: torch.export.ExportedProgram, nodes: list[fx.Node]) -> tuple[list[fx.Node], Tensor | None]:
    """The nodes with the sum of the last and one value per channel, where that alone reads it, and the values."""
    node = nodes[-1]
    reader = _reader(node)
    if reader is None or reader.target is not _aten.add.Tensor or len(reader.args) != 2 or reader.kwargs:
        return nodes, None
    other: Any = reader.args[1] if reader.args[0] is node else reader.args[0]
    values = per_channel(program, other) if isinstance(other, fx.Node) else None
    fits = values is not None and values.numel() == node.meta["val"].shape[1] and values.dtype == torch.float32
    return ([*nodes, reader], values) if fits else (nodes, None)


def _slope(program: torch.export.ExportedProgram, node: Any, channels: int) -> Tensor | None:
    values = behind_views(program, node)
    return None if values is None or values.dtype != torch.float32 else values.expand(channels)


def _reader(node: fx.Node) -> fx.Node | None:
    """The operator that alone reads a node."""
    return next(iter(node.users)) if len(node.users) == 1 and next(iter(node.users)).op == "call_function" else None
