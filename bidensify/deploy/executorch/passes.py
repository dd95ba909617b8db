"""Edits of a captured program: what comes before packed layers is read in parts, and lies as they read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bidensify.deploy.operator import SPEC_VERSION

__all__ = ["layout_pass", "read_in_parts"]

_aten = torch.ops.aten
_LINEAR = 2
_MOST_PARTS = 64


def read_in_parts(graph: fx.Graph) -> int:
    """Lets packed layers read the parts of concatenations and nearest-neighbour upsamplings; returns how many do.

    A concatenation that nothing else reads is then never made.
    """
    changed = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.bidensify.packed_layer.default:
            continue
        parts, up, spec = node.args[0], node.args[1], node.args[4]
        if spec[0] != SPEC_VERSION or spec[1] == _LINEAR:
            continue
        found = [each for part, times in zip(parts, up) for each in _parts(part, times)]
        if [part for part, _ in found] != list(parts) and len(found) <= _MOST_PARTS:
            node.args = ([part for part, _ in found], [times for _, times in found], *node.args[2:])
            changed += 1
    graph.eliminate_dead_code()
    return changed


def _parts(node: Any, up: int) -> list[tuple[Any, int]]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return [(node, up)]
    if node.target is _aten.cat.default and len(node.args) > 1 and node.args[1] in (1, -3):
        return [each for part in node.args[0] for each in _parts(part, up)]
    if node.target is _aten.upsample_nearest2d.vec:
        times = _factor(node.args[0].meta["val"], value)
        if times is not None:
            return _parts(node.args[0], up * times)
    # In evaluation it does nothing.
    if node.target is _aten.dropout.default and node.args[2] is False:
        return _parts(node.args[0], up)
    return [(node, up)]


def _factor(x: Tensor, y: Tensor) -> int | None:
    """The power of two by which height and width grow; there alone is every rounding of indices exact."""
    for times in (2, 4, 8, 16, 32):
        if all(statically_known_true(y.shape[axis] == times * x.shape[axis]) for axis in (2, 3)):
            return times
    return None


def layout_pass() -> Any:
    """A pass over the edge dialect: packed layers get channels_last, kernels that take no other order get contiguous inputs."""
    from executorch.exir.dialects._ops import ops
    from executorch.exir.pass_base import ExportPass

    edge = ops.edge
    clone = edge.dim_order_ops._clone_dim_order.default
    packed = edge.bidensify.packed_layer.default
    plain = {edge.aten.native_group_norm.default}

    class Layout(ExportPass):  # type: ignore[misc]
        def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            def lies(value: Any, last: bool) -> Any:
                if value is None or not isinstance(getattr(value, "data", None), Tensor):
                    return value
                tensor = value.to_tensor()
                order = torch.channels_last if last else torch.contiguous_format
                if (last and tensor.dim() != 4) or tensor.is_contiguous(memory_format=order):
                    return value
                wanted = [0, 2, 3, 1] if last else list(range(tensor.dim()))
                return super(Layout, self).call_operator(clone, (value,), {"dim_order": wanted}, meta)

            if op is packed:
                last = args[4][1] != _LINEAR
                parts = [lies(part, last) for part in args[0]]
                tail = [lies(args[5], False), lies(args[6], False), lies(args[7], last)]
                args = (parts, *args[1:5], *tail)
            elif op in plain:
                args = tuple(lies(value, False) for value in args)
            return super().call_operator(op, args, kwargs, meta)

    return Layout()
