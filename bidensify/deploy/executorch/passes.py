"""An edit of the edge dialect: what comes before packed layers lies as they read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bidensify.deploy.runtimes.prepare import LINEAR

__all__ = ["layout_pass"]


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
                last = args[4][1] != LINEAR
                parts = [lies(part, last) for part in args[0]]
                tail = [lies(args[5], False), lies(args[6], False), lies(args[7], last)]
                args = (parts, *args[1:5], *tail)
            elif op in plain:
                args = tuple(lies(value, False) for value in args)
            return super().call_operator(op, args, kwargs, meta)

    return Layout()
