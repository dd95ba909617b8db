"""Activations beside binary layers: into the layer that they follow, else exchanged at their own place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bidensify.methods import get_method
from bidensify.rewrite.kinds import fused_activation, is_activation
from bidensify.rewrite.plan.code import Site, place_of
from bidensify.rewrite.plan.draft import Draft
from bidensify.rewrite.plan.entries import ActivationPlan, NewActivation, slope_fields
from bidensify.rewrite.plan.passes.factors import is_factor
from bidensify.rewrite.record.recorded import scope_of

__all__ = ["place_activations"]


@dataclass(frozen=True)
class _Use:
    """One activation: a module with all its calls, or one call of a function.

    Attributes:
        path: of the module, or None of a function.
        nodes: its calls.
        behind: for each call the binary layer whose output goes there and nowhere else.
        wanted: for each call what it should become; None where it stays.
        apart: whether code that runs in training alone calls the module too, elsewhere.
    """

    path: str | None
    nodes: list[fx.Node]
    behind: list[str | None]
    wanted: list[NewActivation | None]
    apart: bool = False

    @property
    def shared(self) -> bool:
        """Whether it cannot be exchanged at one path: several places of the code call it, or it has no path."""
        return self.path is None or self.apart or len({place_of(node) or node for node in self.nodes}) > 1


def place_activations(draft: Draft) -> Draft:
    """Fourth pass: ReLU-like activations beside binary layers go into the layer where they follow it, else their place changes.

    Reads absorbed norms and scales and removed adds; sets ``activation`` and ``way`` of layers, adds ``activations`` and changes
    code.
    """
    _place_fused(draft)
    for use in _uses(draft):
        _place(draft, use)
    if draft.factors:
        more = f" (and {len(draft.factors) - 1} more)" if len(draft.factors) > 1 else ""
        draft.note(
            f"{draft.factors[0]}{more}: the activation stays as it is, since others are multiplied with what it gives"
        )
    for layer in draft.binary_layers:
        draft.change(layer.path, activation=layer.activation and layer.path in draft.absorbed_activations)
    return draft


def _uses(draft: Draft) -> Iterator[_Use]:
    calls: dict[str | fx.Node, list[fx.Node]] = defaultdict(list)
    for node in draft.flow.record.graph.nodes:
        if draft.flow.is_activation(node):
            calls[str(node.target) if node.op == "call_module" else node].append(node)
    for key, nodes in calls.items():
        # What earlier uses became is part of what these are asked about.
        behind = [None if is_factor(draft.flow, node) else _layer_before(draft, node) for node in nodes]
        wanted = [_wanted(draft, node, layer) for node, layer in zip(nodes, behind)]
        path = key if isinstance(key, str) else None
        apart = path is not None and draft.flow.record.used_apart(path, behind[0] or "")
        yield _Use(path, nodes, behind, wanted, apart)


def _place(draft: Draft, use: _Use) -> None:
    first = use.behind[0]
    if (
        first is not None
        and use.path is not None
        and not use.apart
        and set(use.behind) == {first}
        and len(use.nodes) == len(draft.flow.calls[first])
        and _takes(draft, first)
    ):
        # One module behind one layer: its work moves into the layer.
        draft.absorbed_activations.add(first)
        draft.change(first, **_slope(draft, use.nodes[0]))
        draft.activations[use.path] = ActivationPlan(use.path, "absorbed")
        return
    if not use.shared and len(set(use.wanted)) == 1:
        new = use.wanted[0]
        if new is not None and not any(_is_read_in_place(draft, node) for node in use.nodes):
            path = str(use.path)
            draft.activations[path] = ActivationPlan(path, "replace", new.channels, new.dim, new.method)
        return
    left = [
        (node, new)
        for node, layer, new in zip(use.nodes, use.behind, use.wanted)
        if new is None or not _change_code(draft, node, layer, new)
    ]
    left = [(node, None if new is None or _is_read_in_place(draft, node) else new) for node, new in left]
    if any(new is not None for _, new in left):
        _place_left(draft, use.path, left)


def _is_read_in_place(draft: Draft, node: fx.Node) -> bool:
    """Whether code reads what a call of an activation writes into, not what it gives: another one there would be lost to it."""
    if not node.meta.get("read_again"):
        return False
    scope = scope_of(node)
    where = f"{(scope[-1][0] if scope else '') or 'the network'}: the functional activation {draft.flow.name(node)}"
    if node.op == "call_module":
        where = f"{node.target}: the activation"
    draft.note(f"{where} stays as it is: the code around it reads what it writes in place, not what it gives")
    return True


def _place_left(draft: Draft, path: str | None, left: list[tuple[fx.Node, NewActivation | None]]) -> None:
    """What a shared module does at the calls that no edit of the code takes from it: an activation for each width."""
    first = left[0][0]
    if path is None:
        draft.site(first)
        where = (scope_of(first)[-1][0] if scope_of(first) else "") or "the network"
        draft.note(
            f"{where}: the functional activation {draft.flow.name(first)} stays as it is, since the code around it could "
            "not be edited"
        )
        return
    kinds = {(new.dim, new.method) for _, new in left if new is not None}
    dim, method = min(kinds)
    replaced = {new.channels for _, new in left if new is not None}
    stay = {(draft.flow.shape(node) or (0, 0))[dim] for node, new in left if new is None}
    if len(kinds) > 1 or replaced & stay:
        draft.site(first)
        draft.note(
            f"{path}: the activation {draft.flow.name(first)} stays as it is: the code around it could not be edited, and "
            "its calls on one width need different activations"
        )
        return
    draft.activations[path] = ActivationPlan(path, "by_width", 0, dim, method, tuple(sorted(replaced)))


def _place_fused(draft: Draft) -> None:
    """The activation inside a fused norm+act that no layer absorbs (pre-activation, GroupNorm) keeps the negative side."""
    for node in draft.flow.record.graph.nodes:
        norm = draft.flow.module(node)
        if norm is None or not draft.flow.is_norm(node) or str(node.target) in draft.activations:
            continue
        inner = fused_activation(norm)
        new = _wanted(draft, node, None) if inner is not None and is_activation(inner) else None
        if new is not None:
            path = f"{node.target}.act"
            draft.activations[path] = ActivationPlan(path, "replace", new.channels, new.dim, new.method)


def _change_code(draft: Draft, node: fx.Node, layer: str | None, new: NewActivation) -> bool:
    """Edits the code at a call of a shared or functional activation; False: the call stays as the code has it."""
    site = draft.site(node, note=False)
    if site is None:
        return False
    if site in draft.code:
        return True
    if layer is not None and _takes(draft, layer) and _folds(draft, node, layer):
        draft.absorbed_activations.add(layer)
        draft.code.hand_through(site, 0, f"the activation behind {layer} moves into it")
        draft.change(layer, way="block", **_slope(draft, node))
        return True
    if node.meta.get("read_again") and not draft.code.rereads(site):
        return False
    name = _new_name(draft, site)
    draft.code.call_instead(site, name, new, f"the activation at step {site.event} becomes {name}")
    return True


def _new_name(draft: Draft, site: Site) -> str:
    """The name of a block's new activation: the entry's own in a plain ``nn.Sequential``, where one more is one more step."""
    record = draft.flow.record
    block = record.modules[site.path]
    if type(block).forward is nn.Sequential.forward and all(
        len(call.events) == len(block._modules) for call in record.calls[site.path]
    ):
        return list(block._modules)[site.event]
    return f"activation_{site.event}"


def _takes(draft: Draft, layer_path: str) -> bool:
    """Whether a layer takes its activation in; what hooks read of a layer is its output before that."""
    return draft.layers[layer_path].activation and not draft.flow.record.modules[layer_path]._forward_hooks


def _folds(draft: Draft, node: fx.Node, layer_path: str) -> bool:
    """Whether every call of the layer is followed by this very step of the block."""
    return {_layer_before(draft, other) for other in draft.flow.siblings(node)} == {layer_path} and len(
        draft.flow.siblings(node)
    ) == len(draft.flow.calls[layer_path])


def _layer_before(draft: Draft, node: fx.Node) -> str | None:
    """The binary layer whose output goes to this activation and nowhere else."""
    current = draft.flow.data_input(node)
    child = node
    while current is not None and draft.flow.only_user(current) is child:
        layer = draft.binary(current)
        if layer is not None:
            return layer.path
        if current in draft.removed:
            child, current = current, draft.removed[current]
        elif draft.is_absorbed_norm(current) or isinstance(draft.flow.module(current), nn.Identity):
            norm = draft.flow.record.modules.get(str(current.target))
            if fused_activation(norm) is not None:
                return None
            child, current = current, draft.flow.data_input(current)
        elif current in draft.absorbed_scales:
            child, current = current, draft.flow.data_input(current)
        else:
            return None
    return None


def _wanted(draft: Draft, node: fx.Node, layer: str | None) -> NewActivation | None:
    """What replaces an activation; None where it stays, as beside no binary layer."""
    if draft.config.activation == "keep":
        return None
    if layer is not None:
        method = draft.layers[layer].method if draft.layers[layer].activation else ""
    else:
        method = draft.method if _beside_binary(draft, node) else ""
    shape = draft.flow.shape(node)
    if not method or get_method(method).activation is None or shape is None or len(shape) < 3:
        return None
    if is_factor(draft.flow, node):
        scope = scope_of(node)
        block = (scope[-1][0] if scope else "") or "the network"
        draft.factors.append(str(node.target) if node.op == "call_module" else f"{block}, {draft.flow.name(node)}")
        return None
    last = draft.flow.channels_last(node)
    return NewActivation(shape[-1] if last else shape[1], -1 if last else 1, method, **_slope(draft, node))


def _slope(draft: Draft, node: fx.Node) -> dict[str, Any]:
    """From what the slope of the negative side starts: fields of ``LayerPlan`` and ``NewActivation``."""
    module, name = draft.flow.module(node), draft.flow.name(node)
    if module is not None:
        return slope_fields(module, str(node.target))
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", node.kwargs.get("weight"))
    if name == "leaky_relu" and isinstance(given, int | float | None):
        return {"slope": 0.01 if given is None else float(given)}
    if name == "prelu" and isinstance(given, fx.Node) and given.op == "get_attr":
        return {"slope_from": str(given.target)}
    return {}


def _beside_binary(draft: Draft, node: fx.Node) -> bool:
    def is_binary(item: fx.Node) -> bool:
        return draft.binary(item) is not None

    ahead = draft.flow.forward_until(node, is_binary, lambda n: not draft.flow.is_layer(n) and n.op != "output")
    if any(True for _ in ahead):
        return True
    stack, seen = list(draft.flow.tensors(node)), set()
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        if is_binary(item):
            return True
        if not draft.flow.is_layer(item):
            stack.extend(draft.flow.tensors(item))
    return False
