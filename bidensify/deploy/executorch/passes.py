"""Edits of the edge dialect that make tensors lie as what reads them expects.

ExecuTorch fixes the order in which a tensor lies (its dim order) when a program is written, and no kernel changes it. Three kinds
of readers are to be served, and each is by one pass:

- a packed layer reads and writes channels_last (a linear one: contiguous), and what is renamed (``views``) is read as it says.
  ``layout_pass`` copies where its input lies otherwise, before XNNPACK takes its share, so that XNNPACK makes most of the copies
  itself.
- a delegate reads and writes the orders that it was made for. What lies in both orders XNNPACK takes for contiguous; all of it is
  called so when memory is planned (``views``).
- of ExecuTorch's own kernels, pointwise ones on tensors of one shape and order take any, since they go through memory; the others
  are written for contiguous tensors: some refuse others, some misread them. ``kernels_pass`` runs on what XNNPACK left: it gives
  them contiguous tensors and puts what they give into the order in which it lay before, so that it changes nothing for whoever
  reads it. Otherwise ExecuTorch itself would make some of them contiguous later, and with them all that follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils._pytree import tree_leaves, tree_map

from bidensify.deploy.runtimes.nodes import same_size
from bidensify.deploy.runtimes.tokens import lasting

__all__ = ["copies_pass", "kernels_pass", "layout_pass", "turns_pass"]

_LAST = [0, 2, 3, 1]


def _order(value: Any) -> list[int] | None:
    """The dimensions of a tensor from the outermost to the innermost in memory; None: no tensor, or none without doubt."""
    try:
        return [int(axis) for axis in value.dim_order()] if isinstance(value, Tensor) else None
    except RuntimeError:
        return None


def _orders(value: Any) -> list[list[int]]:
    """Those in which ExecuTorch can copy."""
    plain = list(range(value.dim())) if isinstance(value, Tensor) else []
    return [plain, _LAST] if len(plain) == 4 else [plain]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, for certain where sizes vary, and one order."""
    return _order(a) == _order(b) and same_size(a, b)


def _in_both(a: Any, b: Any) -> bool:
    """Whether what two tensors name as two orders is one: images of one channel or one pixel lie in both."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_contiguous() and b.is_contiguous()


def _copies() -> tuple[Any, Any]:
    """The operators of the edge dialect that copy a tensor, into another order if asked."""
    from executorch.exir.dialects._ops import ops

    orders = ops.edge.dim_order_ops
    return orders._clone_dim_order.default, orders._to_dim_order_copy.default


def _edited(module: torch.fx.GraphModule, changed: bool) -> PassResult:
    """What a pass that edits a graph in place returns."""
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return PassResult(module, changed)


def copies_pass() -> Any:
    """A pass over the edge dialect, where nothing is written in place: what reads a copy that moves nothing reads the original.
    XNNPACK leaves such copies out itself, and then refuses a share whose result is its input.

    One of an image of one channel into channels_last stays for convolutions, where it decides how what follows them lies, and
    for further copies, whose orders are those of what they were made of.
    """
    from executorch.exir.dialects._ops import ops

    edge = ops.edge
    copies = _copies()
    orders = (edge.aten.convolution.default, *copies)

    def run(module: torch.fx.GraphModule) -> Any:
        changed = False
        for node in module.graph.nodes:
            if node.op != "call_function" or node.target not in copies:
                continue
            before, after = node.args[0].meta.get("val"), node.meta.get("val")
            if _order(before) is None or before.dtype != after.dtype or not same_size(before, after):
                continue
            turned = _order(before) != _order(after)
            if turned and not _in_both(before, after):
                continue
            for reader in list(node.users):
                # What a network returns is a tensor of its own.
                if reader.op != "output" and not (turned and reader.target in orders):
                    reader.replace_input_with(node, node.args[0])
                    changed = True
        return _edited(module, changed)

    return run


def layout_pass() -> Any:
    """A pass over the edge dialect: packed layers get channels_last; kernels that take no other order, and those whose result
    would lie in an order into which ExecuTorch cannot copy (a gather along an image's rows), get contiguous inputs. What is
    expanded to its own size is not.
    """
    from executorch.exir.dialects._ops import ops
    from executorch.exir.pass_base import ExportPass

    edge = ops.edge
    clone, move = _copies()
    packed = edge.bidensify.packed_layer.default
    expand = edge.aten.expand_copy.default
    plain = {edge.aten.native_group_norm.default}
    renamed = edge.bidensify.renamed.default

    class Layout(ExportPass):  # type: ignore[misc]
        def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            def lies(value: Any, last: bool) -> Any:
                if value is None or not isinstance(getattr(value, "data", None), Tensor):
                    return value
                tensor = value.to_tensor()
                order = torch.channels_last if last else torch.contiguous_format
                if (last and tensor.dim() != 4) or tensor.is_contiguous(memory_format=order):
                    return value
                wanted = _LAST if last else list(range(tensor.dim()))
                # XNNPACK leaves a clone that moves anything to ExecuTorch. Of an input or a copy it would hand its own copy
                # through, and refuse to.
                computed = value.node.op == "call_function" and value.node.target not in (clone, move)
                copy = move if last and computed else clone
                return super(Layout, self).call_operator(copy, (value,), {"dim_order": wanted}, meta)

            if op is expand and isinstance(args[0].data, Tensor) and same_size(args[0].data, meta.data.get("val")):
                # A matrix product's operands are expanded to what they are: a copy that parts one delegate from the next.
                return args[0]
            if op is packed:
                given_last, last = lasting(args[4])
                parts = [lies(part, given_last) for part in args[0]]
                tail = [lies(args[5], False), lies(args[6], False), lies(args[7], last)]
                args = (parts, *args[1:5], *tail)
            elif op is renamed:
                args = (lies(args[0], args[1]), *args[1:])
            elif op in plain or _order(meta.data.get("val")) not in (None, *_orders(meta.data.get("val"))):
                args, kwargs = tree_map(lambda value: lies(value, False), (args, kwargs))
            return super().call_operator(op, args, kwargs, meta)

    return Layout()


def kernels_pass() -> Any:
    """A pass over the edge dialect behind XNNPACK's partition: ExecuTorch's own kernels get the order that they are written for,
    and all else sees the order that it saw before.
    """
    from executorch.exir.dialects._ops import ops
    from executorch.exir.pass_base import ExportPass

    edge = ops.edge
    clone, move = _copies()
    # They say themselves how they read: by an order, by strides.
    told = {
        clone,
        move,
        edge.dim_order_ops._empty_dim_order.default,
        edge.aten.as_strided_copy.default,
        edge.bidensify.packed_layer.default,
        edge.bidensify.renamed.default,
    }

    class Kernels(ExportPass):  # type: ignore[misc]
        def _moved(self, value: Any, order: list[int], meta: Any) -> Any:
            return super().call_operator(move, (value,), {"dim_order": order}, meta)

        def _like(self, value: Any, meta: Any) -> Any:
            """The result in the order that it had when delegates were made, but for one that lies in both orders."""
            before, now = meta.data.get("val"), getattr(value, "data", None)
            wanted, found = _order(before), _order(now)
            if wanted is None or found is None or wanted == found:
                return value
            return value if _in_both(before, now) else self._moved(value, wanted, meta)

        def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            given = [value for value in tree_leaves((args, kwargs)) if _order(getattr(value, "data", None)) is not None]
            result = meta.data.get("val")
            ones = [value.data for value in given] + ([result] if isinstance(result, Tensor) else [])
            plain = all(_order(one) == sorted(_order(one) or []) for one in ones)
            alike = all(_alike(one, ones[0]) for one in ones)
            pointwise = torch.Tag.pointwise in getattr(getattr(op, "_op", op), "tags", ())
            if op in told or plain or not given or (pointwise and alike):
                return super().call_operator(op, args, kwargs, meta)

            def contiguous(value: Any) -> Any:
                order = _order(getattr(value, "data", None))
                return value if order is None or order == sorted(order) else self._moved(value, sorted(order), meta)

            args, kwargs = tree_map(contiguous, (args, kwargs))
            return self._like(super().call_operator(op, args, kwargs, meta), meta)

        def call_getitem(self, value: Any, key: int, meta: Any) -> Any:
            return self._like(super().call_getitem(value, key, meta), meta)

    return Kernels()


def turns_pass() -> Any:
    """A pass behind ``kernels_pass``: packed layers read contiguous images themselves, in place of copies in channels_last that
    ExecuTorch's own kernel would make, one element at a time. XNNPACK's copies stay: they are parts of its delegates.
    """
    from executorch.exir.dialects._ops import ops

    edge = ops.edge
    copies = _copies()

    def source(part: Any) -> Any:
        if part.op != "call_function" or part.target not in copies:
            return part
        given = part.args[0]
        before, after = given.meta.get("val"), part.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
            return part
        return given if before.dim() == 4 and _order(before) == [0, 1, 2, 3] and _order(after) == _LAST else part

    def run(module: torch.fx.GraphModule) -> Any:
        changed = False
        for node in module.graph.nodes:
            if (
                node.op == "call_function"
                and node.target is edge.bidensify.packed_layer.default
                and lasting(node.args[4])[0]
            ):
                parts = [source(part) for part in node.args[0]]
                if parts != list(node.args[0]):
                    node.args, changed = (parts, *node.args[1:]), True
        return _edited(module, changed)

    return run
