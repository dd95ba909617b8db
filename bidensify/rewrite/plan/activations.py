"""Activations beside binary layers: into the layer that they follow, else exchanged at their own place."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx, nn

from bidensify.methods import get_method
from bidensify.rewrite.plan.entries import ActivationPlan, NewActivation
from bidensify.rewrite.plan.kinds import fused_activation, is_relu_like
from bidensify.rewrite.record.recorded import scope_of

if TYPE_CHECKING:
    from bidensify.rewrite.plan.planner import Planner

__all__ = ["plan_activations"]


def plan_activations(planner: Planner) -> None:
    """ReLU-like activations beside binary layers: into the layer where they follow it, else at their own place."""
    _plan_fused(planner)
    sites: dict[str, list[fx.Node]] = defaultdict(list)
    for node in planner.record.graph.nodes:
        if planner.flow.is_activation(node):
            sites[str(node.target) if node.op == "call_module" else f"\0{id(node)}"].append(node)
    for key, nodes in sites.items():
        shared = key.startswith("\0") or len({_place(node) for node in nodes}) > 1
        behind = [_layer_before(planner, node) for node in nodes]
        first = behind[0]
        alone = not key.startswith("\0") and all(each == first for each in behind)
        if first is not None and alone and len(nodes) == len(planner.nodes[first]) and _takes(planner, first):
            # One module behind one layer: its work moves into the layer.
            planner.absorbed_activations.add(first)
            planner.activations[key] = ActivationPlan(key, "absorbed")
            continue
        if any(_writes_alone(planner, node) for node in nodes):
            planner.note(
                f"{key}: the activation stays as it is: the code around it reads what it writes in place, not what it gives"
            )
            continue
        wanted = [_activation_of(planner, node, layer_path) for node, layer_path in zip(nodes, behind)]
        if not shared and len(set(wanted)) == 1:
            channels, dim, method = wanted[0]
            if channels:
                planner.activations[key] = ActivationPlan(key, "replace", channels, dim, method)
            continue
        left = [
            (node, made)
            for node, layer_path, made in zip(nodes, behind, wanted)
            if not _plan_site(planner, node, layer_path, made)
        ]
        if any(made[0] for _, made in left):
            _plan_left(planner, key, left)


def note_nonnegative(planner: Planner) -> None:
    """Marks the binary layers whose every input comes from a ReLU that stays as it is, at most pooled or moved on the way."""
    for path, layer in planner.layers.items():
        if layer.action == "binary" and planner.nodes[path]:
            behind = [_stays_nonnegative(planner, node) for node in planner.nodes[path]]
            planner.layers[path] = replace(layer, nonnegative=all(behind))


def _stays_nonnegative(planner: Planner, node: fx.Node) -> bool:
    current = planner.flow.data_input(node)
    while current is not None:
        if planner.flow.is_activation(current):
            place = _place(current)
            edited = isinstance(place, tuple) and place[1] in planner.edits.get(place[0], {})
            replaced = str(current.target) in planner.activations or edited
            return planner.flow.name(current).lower() in ("relu", "relu6") and not replaced
        if not (
            planner.flow.is_pass(current)
            or planner.flow.is_reorder(current)
            or planner.flow.name(current) == "MaxPool2d"
        ):
            return False
        current = planner.flow.data_input(current)
    return False


def _place(node: fx.Node) -> tuple[str, int] | int:
    """Where in the code a call stands: a block that runs twice calls its activation from one place."""
    scope = scope_of(node)
    return (scope[-1][0], int(node.meta["event"])) if scope and "event" in node.meta else id(node)


def _writes_alone(planner: Planner, node: fx.Node) -> bool:
    """Whether a call of an activation in place is a statement of its own: what another module gave there would be lost."""
    module, scope = planner.flow.module(node), scope_of(node)
    if not getattr(module, "inplace", False) or not scope:
        return False
    block = planner.record.modules[scope[-1][0]]
    return any(getattr(block, name, None) is module for name in _bare_calls(type(block)))


def _bare_calls(cls: type[nn.Module]) -> frozenset[str]:
    """Names of the children that a class's forward calls without reading what they give."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    calls = [
        item.value.func for item in ast.walk(tree) if isinstance(item, ast.Expr) and isinstance(item.value, ast.Call)
    ]
    return frozenset(
        call.attr
        for call in calls
        if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "self"
    )


def _plan_left(planner: Planner, key: str, left: list[tuple[fx.Node, tuple[int, int, str]]]) -> None:
    """What a shared module does at the calls that no edit of the code takes from it: an activation for each width."""
    first = left[0][0]
    where = (scope_of(first)[-1][0] if scope_of(first) else "") or "the network"
    if key.startswith("\0"):
        planner.site(first)
        planner.note(
            f"{where}: the functional activation {planner.flow.name(first)} stays as it is, since the code around it could "
            "not be edited"
        )
        return
    kinds = {(dim, method) for _, (channels, dim, method) in left if channels}
    dim, method = min(kinds)
    replaced = {channels for _, (channels, _, _) in left if channels}
    stay = {(planner.flow.shape(node) or (0, 0))[dim] for node, (channels, _, _) in left if not channels}
    if len(kinds) > 1 or replaced & stay:
        planner.site(first)
        planner.note(
            f"{key}: the activation {planner.flow.name(first)} stays as it is: the code around it could not be edited, and "
            "its calls on one width need different activations"
        )
        return
    planner.activations[key] = ActivationPlan(key, "by_width", 0, dim, method, tuple(sorted(replaced)))


def _plan_fused(planner: Planner) -> None:
    """The activation inside a fused norm+act that no layer absorbs (pre-activation, GroupNorm) keeps the negative side."""
    for node in planner.record.graph.nodes:
        norm = planner.flow.module(node)
        if norm is None or not planner.flow.is_norm(node) or str(node.target) in planner.activations:
            continue
        inner = fused_activation(norm)
        if inner is None or not is_relu_like(type(inner).__name__):
            continue
        channels, dim, method = _activation_of(planner, node, None)
        if channels:
            path = f"{node.target}.act"
            planner.activations[path] = ActivationPlan(path, "replace", channels, dim, method)


def _plan_site(planner: Planner, node: fx.Node, layer_path: str | None, made: tuple[int, int, str]) -> bool:
    """Edits the code at a call of a shared or functional activation; False: the call stays."""
    channels, dim, method = made
    site = planner.site(node, note=False) if channels else None
    if site is None:
        return False
    path, event = site
    if event in planner.edits[path]:
        return True
    if layer_path is not None and _takes(planner, layer_path) and _folds(planner, node, layer_path):
        planner.absorbed_activations.add(layer_path)
        planner.edit(path, event, "forward")
        planner.edit_notes[path].append(f"the activation behind {layer_path} moves into it")
        planner.layers[layer_path] = replace(planner.layers[layer_path], way="block")
        return True
    name = _new_name(planner, path, event)
    planner.modules[path][name] = NewActivation(channels, dim, method)
    planner.edit(path, event, "module", module=name)
    planner.edit_notes[path].append(f"the activation at step {event} becomes {name}")
    return True


def _new_name(planner: Planner, path: str, event: int) -> str:
    """The name of a block's new activation: the entry's own in a plain ``nn.Sequential``, where one more is one more step."""
    block = planner.record.modules[path]
    if type(block).forward is nn.Sequential.forward and all(
        len(call.events) == len(block._modules) for call in planner.record.calls[path]
    ):
        return list(block._modules)[event]
    return f"activation_{event}"


def _takes(planner: Planner, layer_path: str) -> bool:
    """Whether a layer takes its activation in; what hooks read of a layer is its output before that."""
    return planner.layers[layer_path].activation and not planner.record.modules[layer_path]._forward_hooks


def _folds(planner: Planner, node: fx.Node, layer_path: str) -> bool:
    """Whether every call of the layer is followed by this very step of the block."""
    return {_layer_before(planner, other) for other in planner.siblings(node)} == {layer_path} and len(
        planner.siblings(node)
    ) == len(planner.nodes[layer_path])


def _layer_before(planner: Planner, node: fx.Node) -> str | None:
    """The binary layer whose output goes to this activation and nowhere else."""
    current = planner.flow.data_input(node)
    child = node
    while current is not None and planner.flow.only_user(current) is child:
        layer = planner.binary(current)
        if layer is not None:
            return layer.path
        if current in planner.removed:
            child, current = current, planner.removed[current]
        elif planner.is_absorbed_norm(current) or isinstance(planner.flow.module(current), nn.Identity):
            norm = planner.record.modules.get(str(current.target))
            if fused_activation(norm) is not None:
                return None
            child, current = current, planner.flow.data_input(current)
        elif current in planner.absorbed_scales:
            child, current = current, planner.flow.data_input(current)
        else:
            return None
    return None


def _activation_of(planner: Planner, node: fx.Node, layer_path: str | None) -> tuple[int, int, str]:
    """(channels, dim, method) of what replaces an activation; channels 0: it is beside no binary layer."""
    if planner.config.activation == "keep":
        return 0, 1, ""
    method = planner.method
    if layer_path is not None:
        if not planner.layers[layer_path].activation:
            return 0, 1, ""
        method = planner.layers[layer_path].method
    elif not _beside_binary(planner, node):
        return 0, 1, ""
    if get_method(method).activation is None:
        return 0, 1, ""
    shape = planner.flow.shape(node)
    if shape is None or len(shape) < 3:
        return 0, 1, ""
    last = planner.flow.channels_last(node)
    return (shape[-1] if last else shape[1]), (-1 if last else 1), method


def _beside_binary(planner: Planner, node: fx.Node) -> bool:
    def is_binary(item: fx.Node) -> bool:
        return planner.binary(item) is not None

    ahead = planner.flow.forward_until(node, is_binary, lambda n: not planner.flow.is_layer(n) and n.op != "output")
    if any(True for _ in ahead):
        return True
    stack, seen = list(planner.flow.tensors(node)), set()
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        if is_binary(item):
            return True
        if not planner.flow.is_layer(item):
            stack.extend(planner.flow.tensors(item))
    return False
