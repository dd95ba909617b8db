"""Residual adds: which signal they carry, and whether the bypasses inside already carry it.

An add is residual if both its operands were computed from one signal inside one block, without a change to a higher
resolution on the way (that would be a fusion of scales, which carries two different signals).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from bidensify.rewrite.plan.code import Site, place_of
from bidensify.rewrite.plan.draft import Draft
from bidensify.rewrite.plan.flow import Flow
from bidensify.rewrite.record.recorded import Scope, scope_of

__all__ = ["Residual", "find_residuals"]

_ENLARGES = re.compile(
    r"upsampl|interpolate|resize|transpose\dd|deconv|shuffle|unpool|fold|grid_sample|repeat", re.IGNORECASE
)


@dataclass
class Residual:
    """One residual add.

    Attributes:
        add: its node.
        main: the operand that the chain of layers ends in.
        last: path of the last binary layer of that chain.
        removable: whether the bypasses along the chain carry all that the shortcut carried, and nothing rescales it.
        scales: layer scales between the last layer and the add.
    """

    add: fx.Node
    main: fx.Node
    last: str
    removable: bool
    scales: list[fx.Node] = field(default_factory=list)


def _block_scope(flow: Flow, add: fx.Node) -> Scope:
    """The innermost call around the add in which a layer ran on the way to it."""
    scope = scope_of(add)
    while scope:
        inside = [node for node in flow.ancestors(add, scope) if flow.within(node, scope)]
        if any(flow.is_layer(node) for node in inside):
            return scope
        scope = scope[:-1]
    return scope


def _grows(flow: Flow, nodes: set[fx.Node]) -> bool:
    """Whether any step among the nodes has more pixels than what it read (an attention's matrices are no pixels)."""
    for node in nodes:
        shape = flow.shape(node)
        if _ENLARGES.search(flow.name(node)) is None:
            continue
        for source in flow.tensors(node):
            before = flow.shape(source)
            if shape is None or before is None or len(shape) != 4 or len(before) != 4 or source not in nodes:
                continue
            if before[-2:] == (1, 1) or flow.channels_last(node) or flow.channels_last(source):
                continue
            if shape[-1] > before[-1] or shape[-2] > before[-2]:
                return True
    return False


def _source_among(flow: Flow, node: fx.Node, nodes: set[fx.Node]) -> fx.Node | None:
    """The first of ``nodes`` that ``node`` hands through, behind identities and dropouts alone."""
    current: fx.Node | None = node
    while current is not None and current not in nodes:
        current = flow.data_input(current) if flow.is_pass(current) else None
    return current


def _split(flow: Flow, add: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(main, fork, identity shortcut?) of a residual add; None for a sum of different signals."""
    first, second = flow.tensors(add)
    if first is second:
        return None
    scope = _block_scope(flow, add)
    from_first, from_second = flow.ancestors(first, scope), flow.ancestors(second, scope)
    for main, other, ancestors in ((second, first, from_second), (first, second, from_first)):
        source = _source_among(flow, other, ancestors)
        if source is not None:
            return main, source, True
    common = {node for node in from_first & from_second if flow.shape(node) is not None and node.op != "get_attr"}
    if not common:
        return None
    fork = max(common, key=lambda node: flow.order[node])
    before_fork = flow.ancestors(fork, scope)

    def layers(nodes: set[fx.Node]) -> tuple[int, int]:
        inside = [node for node in nodes - before_fork if flow.is_layer(node)]
        taps = 0
        for node in inside:
            kernel = getattr(flow.module(node), "kernel_size", (1,))
            taps = max(taps, *(kernel if isinstance(kernel, tuple) else (kernel,)))
        return len(inside), taps

    main, nodes = (first, from_first) if layers(from_first) >= layers(from_second) else (second, from_second)
    if _grows(flow, (nodes - before_fork) | {fork}) or any(_only_pooled(flow, side, fork) for side in (first, second)):
        return None
    return main, fork, False


def _only_pooled(flow: Flow, node: fx.Node, fork: fx.Node) -> bool:
    """Whether all that ``node`` has of ``fork`` went through a pooled 1×1 map: one value for all pixels is no signal."""
    stack, seen = [node], set()
    while stack:
        item = stack.pop()
        if item is fork:
            return False
        if item in seen or (flow.shape(item) or ())[2:] == (1, 1):
            continue
        seen.add(item)
        stack.extend(flow.tensors(item))
    return (flow.shape(fork) or ())[2:] != (1, 1)


def _last_layer(draft: Draft, main: fx.Node, add: fx.Node) -> tuple[str, list[fx.Node], bool] | None:
    """The binary layer whose output, at most normalised, scaled, activated or moved, is the add's operand.

    Returns:
        Its path, the layer scales behind it, and whether a norm of its own stands between it and the add.
    """
    flow = draft.flow
    current: fx.Node | None = main
    child = add
    normed = False
    scales: list[fx.Node] = []
    readers: set[fx.Node] = set()
    while current is not None:
        # What computes a gate reads the signal that the gate multiplies; anything else that reads it is a fork.
        if any(user is not child and user not in readers for user in current.users):
            return None
        layer = draft.binary(current)
        if layer is not None:
            return layer.path, scales, normed
        gated = flow.gated(current)
        if gated is not None:
            readers |= flow.ancestors(gated[1], scope_of(add))
            child, current = current, gated[0]
            continue
        if flow.is_part(current):
            # An add to some of the channels, the others go beside it (ReXNet): those had no shortcut, as those of a wider
            # layer have none.
            source = flow.data_input(current)
            readers |= {user for user in (source.users if source is not None else ()) if flow.is_part(user)}
        elif flow.layer_scale(current) is not None:
            scales.append(current)
        elif flow.is_norm(current):
            normed = normed or not draft.is_absorbed_norm(current)
        elif not (
            flow.is_pass(current)
            or flow.is_scaling(current)
            or flow.is_reorder(current)
            or flow.is_move(current)
            or flow.is_activation(current)
        ):
            return None
        child, current = current, flow.data_input(current)
    return None


def _carried(draft: Draft, main: fx.Node, fork: fx.Node, scales: list[fx.Node]) -> bool:
    """Whether the chain from ``fork`` to ``main`` loses nothing: its bypasses, and nothing else, carry the signal."""
    flow = draft.flow
    shape = flow.shape(fork)
    if shape is None:
        return False
    last_dim = flow.channels_last(fork)
    channels = shape[-1] if last_dim else shape[1]
    pixels = flow.spatial(fork, -1 if last_dim else 1)
    current: fx.Node | None = main
    while current is not None and current is not fork:
        layer = draft.binary(current)
        if layer is not None:
            sizes = flow.spatial(current, -1 if layer.kind == "linear" else 1)
            if not layer.bypass or layer.out_channels < channels or max(layer.stride) > 1 or sizes != pixels:
                return False
        elif not (
            current in scales
            or current in draft.removed
            or (flow.is_norm(current) and not flow.more_than_norm(current))
            or flow.is_activation(current)
            or (flow.is_pass(current) and not flow.drops(current))
            or flow.is_reorder(current)
        ):
            return False
        child = current
        current = draft.removed.get(current) or flow.data_input(current)
        if current is not None and current is not fork:
            readers = [user for user in current.users if user is not child and user not in draft.removed]
            if readers:
                return False
    return current is fork


def find_residuals(draft: Draft) -> Iterator[Residual]:
    """Yields each residual add whose chain ends in a binary layer, in the order of the run."""
    flow = draft.flow
    seen: set[Site] = set()
    for node in list(flow.record.graph.nodes):
        if not flow.is_add(node, ("add", "sub")):
            continue
        place = place_of(node)
        if place in seen:
            continue
        if place is not None:
            seen.add(place)
        split = _split(flow, node)
        if split is None:
            continue
        main, fork, identity = split
        last = _last_layer(draft, main, node)
        if last is None and not identity:
            # The chain ends in a layer that stays (or a concatenation): it is the projection that has a bypass too many.
            main = next(item for item in flow.tensors(node) if item is not main)
            last = _last_layer(draft, main, node)
        if last is None:
            continue
        path, scales, normed = last
        weighted = node.kwargs.get("alpha", 1) != 1
        removable = (
            identity
            and flow.is_add(node)
            and not (weighted or normed)
            and len(scales) <= 1
            and _carried(draft, main, fork, scales)
        )
        yield Residual(node, main, path, removable, scales)
