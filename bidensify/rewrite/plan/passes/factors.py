"""Activations whose result is a factor of a product: not features that a next layer reads, but what others are weighed with."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from bidensify.rewrite.plan.flow import Flow

__all__ = ["is_factor"]

_PRODUCTS = ("mul", "div", "truediv", "matmul", "bmm")


def is_factor(flow: Flow, node: fx.Node) -> bool:
    """Whether an activation's result weighs another computed tensor: a gate by hand, a query or key of linear attention.

    The data that a gate or a pooled statistic multiplies is no factor, nor are features that are multiplied with themselves
    or with other features (correlations, gated units: the ReLU family's are unbounded there as features are), nor what
    gives a softmax its scores.
    """
    return flow.is_hand_written_gate(node) or any(_weighs(flow, node, *each) for each in _products(flow, node))


def _products(flow: Flow, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, bool]]:
    """(product, operand made of the activation's result alone, other operand, whether a number was added or a gate passed)."""
    stack, seen = [(node, False)], {node}
    while stack:
        item, moved = stack.pop()
        for user in item.users:
            operands = flow.tensors(user)
            if user.op == "call_function" and flow.name(user) in _PRODUCTS and len(operands) == 2:
                other = operands[1 - operands.index(item)]
                if other.op != "get_attr" and flow.reads_input(other):
                    yield user, item, other, moved
                    continue
            if user not in seen and (
                flow.is_scaling(user)
                or flow.is_reorder(user)
                or flow.is_pass(user)
                or flow.is_gate(user)
                or flow.name(user) in ("expand", "expand_as")
            ):
                seen.add(user)
                shifts = flow.is_gate(user) or (flow.is_scaling(user) and flow.name(user) in ("add", "sub"))
                stack.append((user, moved or shifts))


def _source(flow: Flow, node: fx.Node) -> fx.Node:
    """What a tensor is a reshaped copy of."""
    while flow.is_reorder(node) or flow.is_pass(node):
        source = flow.data_input(node)
        if source is None:
            break
        node = source
    return node


def _weighs(flow: Flow, node: fx.Node, product: fx.Node, item: fx.Node, other: fx.Node, moved: bool) -> bool:
    if flow.ends_in_gate(other) or _source(flow, item) is _source(flow, other):
        return False
    if flow.name(product) in ("matmul", "bmm"):
        # What a softmax reads are scores of either sign.
        ahead = flow.forward_until(
            product,
            stop=flow.is_gate,
            follow=lambda n: flow.is_scaling(n) or flow.is_reorder(n) or flow.is_pass(n) or flow.is_add(n),
        )
        return not any(True for _ in ahead)
    if flow.shape(item) != flow.shape(product) or (
        flow.name(product) in ("div", "truediv") and flow.tensors(product)[1] is item
    ):
        return True
    # What has fewer values than the product is spread over the data; between features of one shape a bound or shift tells.
    bounded = flow.name(node).lower() in ("relu6", "hardtanh")
    return flow.shape(other) == flow.shape(product) and (moved or bounded)
