"""Sums outside of residual blocks: no full-precision stream may join a sum twice.

A stream is a full-precision signal at one resolution: what a layer that stays in full precision gave, copied and averaged
by bypasses since. At a lower resolution it is another stream (of the same origin); upsampled it is what it was. So a
decoder's sum of a skip and of what comes from below joins two streams, as the original adds two signals; but where
branches exchange their features again and again (HRNet), or run in parallel over one input (RepVGG, MobileOne), both
sides of a sum carry the same stream, and it would double with every sum.
"""

from __future__ import annotations

import re

from torch import fx

from bidensify.rewrite.plan.draft import Draft

__all__ = ["drop_doubled"]

# Origin (the node that gave it) and number of positions.
Streams = frozenset[tuple[fx.Node, int]]
_NONE: Streams = frozenset()
_HANDS_ON = re.compile(
    r"pool|upsample|interpolate|pad|pixel_?(un)?shuffle|roll|chunk|split|unbind|getitem|^_item$|narrow|expand|mean",
    re.IGNORECASE,
)


def drop_doubled(draft: Draft) -> Draft:
    """Third pass: takes the bypass from layers whose sum carries their full-precision stream already, in the order of the run.

    Reads which residual adds are removed; sets ``bypass`` of layers.
    """
    if draft.residual != "double":
        found: dict[fx.Node, Streams] = {}
        for node in draft.flow.record.graph.nodes:
            found[node] = _streams(draft, node, found)
    return draft


def _computed(draft: Draft, node: fx.Node) -> list[fx.Node]:
    """The tensor arguments that are not parameters or constants."""
    return [
        item
        for item in draft.flow.tensors(node)
        if item.op != "get_attr" and not (item.op == "placeholder" and item.target == "constant")
    ]


def _handed_on(draft: Draft, source: fx.Node, node: fx.Node, streams: Streams) -> Streams:
    before, after = draft.flow.positions(source), draft.flow.positions(node)
    if draft.flow.is_reorder(node) or after >= before:
        return streams
    return frozenset((origin, after) for origin, _ in streams)


def _streams(draft: Draft, node: fx.Node, found: dict[fx.Node, Streams]) -> Streams:
    flow = draft.flow
    sources = _computed(draft, node)
    if node.op in ("get_attr", "output") or (node.op == "placeholder" and node.target == "constant"):
        return _NONE
    fresh: Streams = frozenset({(node, draft.flow.positions(node))})
    if node in draft.removed:
        return found[draft.removed[node]]
    layer = draft.binary(node)
    if layer is not None:
        # What a layer reads is full-precision, wherever it came from.
        read = found[sources[0]] or frozenset({(sources[0], draft.flow.positions(sources[0]))})
        return _handed_on(draft, sources[0], node, read) if layer.bypass else _NONE
    if flow.is_layer(node) or not sources:
        return fresh
    if flow.is_add(node) and len(sources) == 2:
        return _joined(draft, node, sources, found)
    name = flow.name(node)
    if name == "sub" and len(sources) == 2:
        return found[sources[0]] ^ found[sources[1]]
    if name in ("cat", "concat", "concatenate", "stack"):
        return frozenset().union(*(found[item] for item in sources))
    gated = flow.gated(node)
    if gated is not None:
        return _handed_on(draft, gated[0], node, found[gated[0]])
    if len(sources) == 1 and (_is_transparent(draft, node) or name in ("add", "sub", "rsub", "mul", "div", "truediv")):
        return _handed_on(draft, sources[0], node, found[sources[0]])
    return fresh


def _is_transparent(draft: Draft, node: fx.Node) -> bool:
    flow = draft.flow
    return (
        flow.is_norm(node)
        or flow.is_activation(node)
        or flow.is_pass(node)
        or flow.is_reorder(node)
        or flow.layer_scale(node) is not None
        or _HANDS_ON.search(flow.name(node)) is not None
    )


def _joined(draft: Draft, add: fx.Node, sources: list[fx.Node], found: dict[fx.Node, Streams]) -> Streams:
    first, second = sources
    if found[first] & found[second]:
        # The side that ends in binary layers gives way to one that hands on what it read.
        sides = [(_bypasses(draft, side, add), side) for side in (second, first)]
        sides = [(paths, side) for paths, side in sides if paths]
        if sides:
            paths, side = sides[0]
            for path in paths or ():
                draft.change(path, "the sum carries its full-precision signal already", bypass=False)
            return found[first if side is second else second]
    return found[first] | found[second]


def _bypasses(draft: Draft, node: fx.Node, child: fx.Node) -> list[str] | None:
    """Layers whose bypasses are all of the stream that a value carries; None if there is more, or if others read it."""
    flow = draft.flow
    readers: set[fx.Node] = set()
    while True:
        if any(user is not child and user not in readers for user in node.users):
            return None
        layer = draft.binary(node)
        if layer is not None:
            return [layer.path] if layer.bypass else []
        sources = _computed(draft, node)
        if flow.is_add(node) and len(sources) == 2 and node not in draft.removed:
            sides = [_bypasses(draft, item, node) for item in sources]
            return None if None in sides else [path for side in sides for path in side or ()]
        gated = flow.gated(node)
        if gated is not None:
            readers |= {item for item in flow.ancestors(gated[1]) if item not in flow.ancestors(gated[0])}
            child, node = node, gated[0]
            continue
        hands_on = len(sources) == 1 and not flow.is_layer(node) and node.op != "placeholder"
        if not hands_on or not (_is_transparent(draft, node) or flow.is_scaling(node)):
            return None
        child, node = node, sources[0]
