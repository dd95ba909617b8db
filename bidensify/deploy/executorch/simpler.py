"""What ExecuTorch's own kernels would compute one element at a time, written with what XNNPACK has, and as joins, in which whole
runs are copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bidensify.deploy.executorch.constants import constant, known, per_channel
from bidensify.deploy.executorch.views import RENAMED
from bidensify.deploy.runtimes.nodes import enlarged, valued

__all__ = ["for_xnnpack"]

_aten = torch.ops.aten
# The largest factor of an enlargement that is written so; XNNPACK joins no more tensors at once.
_MOST = 5
_BINARY = (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)


def for_xnnpack(program: torch.export.ExportedProgram) -> None:
    """Sums of stacked tensors become additions in their order; nearest enlargements by whole factors, where sizes are fixed,
    repeat each pixel's channels, then each row; group norms of images are means and products; a value per channel has four
    dimensions where an image is read with it. Values stay the same to the rounding of sums, whose order no runtime promises.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is _aten.sum.dim_IntList:
            _sum(graph, node)
        elif node.target is _aten.upsample_nearest2d.vec:
            _enlargement(graph, node)
        elif node.target is _aten.group_norm.default:
            _group_norm(program, node)
        elif node.target in _BINARY:
            _per_channel(program, node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _sum(graph: fx.Graph, node: fx.Node) -> None:
    stack: Any = node.args[0]
    if stack.target is not _aten.stack.default or len(stack.users) > 1 or len(node.args) > 2 or node.kwargs:
        return
    parts, value = stack.args[0], stack.meta["val"]
    axis = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    axes: Any = node.args[1] or []
    # Integers are summed in another type than theirs.
    if not value.is_floating_point() or len(parts) < 2:
        return
    if [each % value.dim() for each in axes] != [axis % value.dim()]:
        return
    # What is written into a part behind the stack is not in the sum.
    with graph.inserting_before(stack):
        total = parts[0]
        for part in parts[1:]:
            total = _call(graph, _aten.add.Tensor, total, part)
    node.replace_all_uses_with(total)


def _enlargement(graph: fx.Graph, node: fx.Node) -> None:
    given: Any = node.args[0]
    before, after = given.meta["val"], node.meta["val"]
    sizes = [*before.shape, *after.shape[2:]]
    if not all(isinstance(size, int) for size in sizes):
        return
    factors = enlarged(node, _MOST)
    if factors is None or factors == (1, 1):
        return
    n, c, h, w, rows, columns = sizes
    down, across = factors
    with graph.inserting_before(node):
        x = _call(graph, RENAMED, given, True, [n, h, w, c], False)
        x = _call(graph, _aten.cat.default, [x] * across, 3) if across > 1 else x
        x = _call(graph, RENAMED, x, False, [n, h, columns * c], False)
        x = _call(graph, _aten.cat.default, [x] * down, 2) if down > 1 else x
        made = _call(graph, RENAMED, x, False, [n, c, rows, columns], True)
    node.replace_all_uses_with(made)


def _group_norm(program: torch.export.ExportedProgram, node: fx.Node) -> None:
    """ExecuTorch's group norm reads an image's channels one after another: a copy of it into that order and one back. Means of
    each channel are XNNPACK's; convolutions of one pixel take a group's mean of them and hand it to the group's channels.
    """
    given: list[Any] = [*node.args, *(None, None, 1e-5, None)[len(node.args) - 2 :]]
    x, groups, weight, bias, eps, _ = given
    value = x.meta["val"]
    if value.dim() != 4 or value.dtype != torch.float32:
        return
    graph, channels = program.graph, value.shape[1]
    scale = torch.ones(channels) if weight is None else known(program, weight)
    shift = torch.zeros(channels) if bias is None else known(program, bias)
    if scale is None or shift is None:
        return

    def fixed(name: str, tensor: Tensor) -> fx.Node:
        return constant(program, f"{node.name}_{name}", tensor)

    each = fixed("mean", torch.full((groups, channels // groups, 1, 1), groups / channels))
    hand_on = fixed("ones", torch.ones(channels, 1, 1, 1))
    scaled = fixed("scale", scale.view(channels, 1, 1, 1))
    shifted = fixed("shift", shift.view(1, channels, 1, 1))
    above_zero = fixed("eps", torch.full((groups,), eps))
    with graph.inserting_before(node):

        def convolution(image: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
            return _call(graph, _aten.conv2d.default, image, weight, bias, [1, 1], [0, 0], [1, 1], groups)

        def mean(image: fx.Node, bias: fx.Node | None = None) -> fx.Node:
            return convolution(_call(graph, _aten.mean.dim, image, [2, 3], True), each, bias)

        # Not the mean of squares less the square of the mean, which cancels where the mean is large.
        difference = _call(graph, _aten.sub.Tensor, x, convolution(mean(x), hand_on))
        variance = mean(_call(graph, _aten.mul.Tensor, difference, difference), above_zero)
        factor = convolution(_call(graph, _aten.rsqrt.default, variance), scaled)
        made = _call(graph, _aten.add.Tensor, _call(graph, _aten.mul.Tensor, difference, factor), shifted)
    node.replace_all_uses_with(made)


def _per_channel(program: torch.export.ExportedProgram, node: fx.Node) -> None:
    """XNNPACK reads a constant of four dimensions in an image's own order; to add one of (C, 1, 1), or a view of one, it turns
    the image there and back.
    """
    for given in [each for each in node.args[:2] if isinstance(each, fx.Node)]:
        values = per_channel(program, given)
        if values is not None and node.meta["val"].dim() == 4 and known(program, given) is None:
            node.replace_input_with(given, constant(program, given.name, values.view(1, -1, 1, 1)))


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return valued(graph.call_function(target, args))
