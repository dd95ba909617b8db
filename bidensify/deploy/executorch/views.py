"""Tensors under another name: (N, C, H, W) in channels_last, (N, H, W, C) and (N, H, W * C) are the same memory.

XNNPACK does not know that: a permute from one to the other is two transposes, a reshape a copy. The operator here says what is
meant while a program is lowered, XNNPACK leaves it alone, and no file holds it: when memory is planned, it becomes a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["RENAMED", "planning"]

_library: Any = torch.library.Library("bidensify", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "(Tensor x, bool image, int[] shape, bool to_image"
_library.define(f"renamed{_SCHEMA}) -> Tensor")
_library.define(f"renamed.out{_SCHEMA}, *, Tensor(a!) out) -> Tensor(a!)")


def _renamed(x: Tensor, image: bool, shape: list[int], to_image: bool) -> Tensor:
    rows = x.permute(0, 2, 3, 1) if image else x
    if not to_image:
        return rows.reshape(shape).clone(memory_format=torch.contiguous_format)
    n, c, h, w = shape
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2).clone(memory_format=torch.channels_last)


_library.impl("renamed", _renamed, "CompositeExplicitAutograd")
torch.library.register_fake("bidensify::renamed.out", lambda *arguments, out: out, lib=_library)
# The values of ``x`` as they lie in memory, as a tensor of ``shape``. ``image``: x (N, C, H, W) lies in channels_last, else as
# its dimensions stand; ``to_image``: so does the result.
RENAMED = torch.ops.bidensify.renamed.default


def _call_contiguous(graph: torch.fx.Graph) -> None:
    """Of a tensor that lies in several orders at once, as an image of one channel does, torch names this one or that one, XNNPACK
    and kernels that compare orders want one: the contiguous.
    """
    from executorch.exir.tensor import stride_from_dim_order

    for node in graph.nodes:
        for spec in tree_leaves(node.meta.get("spec")):
            order = getattr(spec, "dim_order", None)
            if order is None or list(order) == sorted(order):
                continue
            moving = [axis for axis in order if spec.shape[axis] != 1]
            if moving == sorted(moving):
                spec.dim_order, spec.stride = sorted(order), stride_from_dim_order(list(spec.shape), sorted(order))
                if "dim_order" in node.kwargs:
                    node.kwargs = {**node.kwargs, "dim_order": sorted(order)}


def planning(*algorithms: Any) -> Any:
    """ExecuTorch's memory planning by the best of ``algorithms``, with views in place of what is renamed."""
    from executorch.exir import memory
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.replace_view_copy_with_view_pass import _ViewSpec

    renamed = torch.ops.bidensify.renamed.out

    def view(node: Any) -> None:
        base, before = node.args[0], node.meta["spec"]
        # What is planned is the tensor, not a view of it.
        base = base.args[0] if base.target is memory.view else base
        spec = _ViewSpec(base.meta["spec"], before.shape)
        spec.stride, spec.dim_order = before.stride, before.dim_order
        node.target, node.args, node.kwargs = memory.view, (base, list(before.shape)), {}
        node.meta["spec"] = spec

    class Planning(MemoryPlanningPass):  # type: ignore[misc]
        def run(self, graph_module: Any, graph_signature: Any = None) -> Any:
            _call_contiguous(graph_module.graph)
            for node in graph_module.graph.nodes:
                if node.target is renamed or (node.target is memory.view and node.args[0].target is memory.view):
                    view(node)
                elif node.op == "output":
                    node.meta["spec"] = torch.fx.map_arg(node.args[0], lambda each: each.meta["spec"])
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
            return super().run(graph_module, graph_signature)

    return Planning(MemoryPlanningAlgorithmSuite(list(algorithms)))
