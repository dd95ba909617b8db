"""Which layers become binary: the defaults' reasons to keep one, and the user's rules."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize, prune

from bidensify.config import BidensifyConfig, Rule
from bidensify.errors import PlanError
from bidensify.methods import get_method
from bidensify.rewrite.flow import Flow
from bidensify.rewrite.kinds import macs_of
from bidensify.rewrite.plan import LayerPlan
from bidensify.rewrite.recorded import scope_of

__all__ = ["plan_layers"]

# At most so many channels hold values (a colour, a flow, a depth), whose signs alone say next to nothing.
_RAW = 3

_KINDS = ("conv2d", "conv_transpose2d", "linear")


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),)


def _describe(flow: Flow, path: str, module: nn.Module, nodes: list[fx.Node]) -> LayerPlan:
    """The layer's facts, with no decision taken yet."""
    shapes = [flow.shape(node) or () for node in nodes]
    uses = flow.record.weights.get(path, [])
    output = shapes[0] if shapes else ()
    if isinstance(module, nn.Linear):
        kind, groups = "linear", 1
        kernel: tuple[int, ...] = (1,)
        stride: tuple[int, ...] = (1,)
        in_channels, out_channels, spatial = module.in_features, module.out_features, output[1:-1]
    else:
        assert isinstance(module, nn.modules.conv._ConvNd)
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        kind = ("conv_transpose" if transposed else "conv") + f"{len(_tuple(module.kernel_size))}d"
        kernel, stride, groups = _tuple(module.kernel_size), _tuple(module.stride), module.groups
        in_channels, out_channels, spatial = module.in_channels, module.out_channels, output[2:]
    return LayerPlan(
        path=path,
        kind=kind,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel,
        stride=stride,
        groups=groups,
        output=tuple(spatial),
        macs=sum(macs_of(module, shape) for shape in shapes if shape),
        calls=len(nodes),
        action="binary",
        reason="",
        makes_weight=bool(uses) and not any(uses),
    )


def _on_single_pixel(flow: Flow, node: fx.Node) -> bool:
    source = flow.data_input(node)
    shape, out = flow.shape(source) if source is not None else None, flow.shape(node)
    return shape is not None and out is not None and shape[2:] == (1, 1) and out[2:] == (1, 1)


def _is_gate(flow: Flow, node: fx.Node) -> bool:
    """The layer's output is squashed (sigmoid, ...) and then multiplies something."""
    current = flow.only_user(node)
    while current is not None and (flow.is_norm(current) or flow.is_pass(current)):
        current = flow.only_user(current)
    if current is None or not flow.is_gate(current):
        return False
    reached = flow.forward_until(
        current,
        stop=lambda n: flow.name(n) in ("mul", "matmul", "bmm"),
        follow=lambda n: (
            flow.is_pass(n)
            or flow.is_reorder(n)
            or flow.name(n) in ("expand", "expand_as", "interpolate", "add", "sub")
        ),
    )
    return any(True for _ in reached)


def _is_predictor(flow: Flow, node: fx.Node) -> bool:
    """No layer, norm or block reads the layer's output any more: it is the network's, or nobody's.

    Features of a backbone end in a norm or a residual add; a prediction does not. A prediction that is refined (optical
    flow) goes on into the next round as well: what tells it from features is that it has values, not channels. An auxiliary
    head runs in evaluation mode too, where nobody reads it.
    """
    channels = getattr(flow.module(node), "out_channels", None)
    if channels is not None and channels <= _RAW:
        ways = flow.forward_until(
            node, stop=lambda n: n.op == "output", follow=lambda n: not (flow.is_layer(n) or flow.is_norm(n))
        )
        if any(True for _ in ways):
            return True
    stack, seen = list(node.users), set()
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        if flow.is_layer(item) or flow.is_norm(item):
            return False
        if flow.is_add(item) and any(
            flow.ancestors(other, scope_of(item)) & flow.ancestors(node, scope_of(item))
            and flow.has_upstream_layer(other)
            for other in flow.tensors(item)
            if node not in flow.ancestors(other)
        ):
            return False
        stack.extend(item.users)
    return True


def _default_reason(flow: Flow, layer: LayerPlan, nodes: list[fx.Node], config: BidensifyConfig) -> str:
    """Why the layer stays in full precision by default, or an empty string."""
    if not nodes:
        return "never called in the recorded run"
    if layer.kind not in _KINDS:
        return f"{layer.kind} is out of reach"
    if layer.kind == "linear":
        dims = {len(flow.shape(node) or ()) for node in nodes}
        if config.linear == "off":
            return "linear layers are off (linear='off')"
        if config.linear == "pointwise" and dims != {4}:
            return "linear layer on tokens (linear='pointwise' takes NHWC maps alone)"
        if dims & {1, 2}:
            return "linear layer on vectors"
    if config.keep_first and any(not flow.has_upstream_layer(node) for node in nodes):
        return "first layer on the image"
    if layer.kind != "linear" and layer.in_channels <= _RAW:
        return f"on {layer.in_channels} raw values, as a first layer is"
    if layer.kind != "linear" and any(_on_single_pixel(flow, node) for node in nodes):
        return "on a pooled 1×1 map"
    if any(_is_gate(flow, node) for node in nodes):
        return "gate"
    if config.keep_last and any(_is_predictor(flow, node) for node in nodes):
        return "prediction layer"
    return ""


def _maker(module: nn.Module) -> str:
    """What makes the weight that a layer convolves with."""
    if parametrize.is_parametrized(module, "weight"):
        parts = module.get_submodule("parametrizations.weight").children()
        return "the parametrization " + ", ".join(type(part).__name__ for part in parts)
    hooks = [type(hook) for hook in module._forward_pre_hooks.values()]
    hooks = [hook for hook in hooks if hook.__module__.startswith("torch.nn.utils.")]
    if hooks:
        return "the hook " + ", ".join(hook.__name__ for hook in hooks)
    return f"the forward of {type(module).__name__}"


def _unusual(flow: Flow, layer: LayerPlan, module: nn.Module) -> str:
    """Why a layer that is called is no convolution with one weight, or an empty string."""
    if layer.calls == 0 or layer.kind not in _KINDS:
        return ""
    uses = flow.record.weights.get(layer.path, [])
    if len(uses) == layer.calls and len(set(uses)) == 1:
        if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            return (
                "its weights are pruned, and a bit has no zero (torch.nn.utils.prune.remove makes them plain weights)"
            )
        return ""
    return f"the forward of {type(module).__name__} is not one convolution with its weight"


def _matches(rule: Rule, layer: LayerPlan, module: nn.Module) -> bool:
    pattern = rule.match
    if pattern.startswith("re:"):
        try:
            fits = re.fullmatch(pattern[3:], layer.path) is not None
        except re.error as error:
            raise PlanError(f"rule {pattern!r}: not a regular expression ({error})") from error
    elif pattern.startswith("class:"):
        fits = any(cls.__name__ == pattern[6:] for cls in type(module).__mro__)
    else:
        fits = fnmatch.fnmatchcase(layer.path, pattern)
    if not fits:
        return False
    sizes = {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": max(layer.kernel_size),
        "stride": max(layer.stride),
        "groups": layer.groups,
        "height": layer.output[0] if layer.output else 0,
        "width": layer.output[-1] if layer.output else 0,
    }
    return all(
        (low is None or sizes[key] >= low) and (high is None or sizes[key] <= high)
        for key, (low, high) in rule.where.items()
    )


def _decide(
    layer: LayerPlan, module: nn.Module, reason: str, unusual: str, rule: Rule | None, config: BidensifyConfig
) -> LayerPlan:
    method, act_scale = config.method, config.act_scale
    bypass: bool | None = None
    activation = config.activation != "keep"
    forced = ""
    if rule is not None:
        if rule.action == "keep":
            return replace(layer, action="keep", reason=f"rule {rule.match!r}", eligible=not reason)
        forced = f"rule {rule.match!r}"
        if isinstance(rule.action, Mapping):
            method = rule.action.get("method", method)
            act_scale = rule.action.get("act_scale", act_scale)
            bypass = rule.action.get("bypass")
            activation = rule.action.get("activation", config.activation) != "keep"
        elif rule.action != "binarize":
            method = str(rule.action)
    impossible = unusual or layer.calls == 0 or layer.kind not in _KINDS
    if (reason and not forced) or impossible:
        return replace(layer, action="keep", reason=unusual or reason, eligible=False)
    found = get_method(method)
    maker = f"; binarizes the weight that {_maker(module)} makes" if layer.makes_weight else ""
    return replace(
        layer,
        reason=(forced or "default") + maker,
        way="path",
        method=method,
        act_scale=act_scale,
        bypass=found.bypass if bypass is None else bypass,
        activation=activation and found.activation is not None,
        eligible=not reason,
    )


def plan_layers(flow: Flow, config: BidensifyConfig) -> tuple[list[LayerPlan], dict[str, int]]:
    """Every layer with its action and reason, and how many layers each rule decided.

    Raises:
        PlanError: a rule matches no layer, a method is unknown, or the network has no convolution.
    """
    called = flow.record.module_nodes()
    order = {path: number for number, path in enumerate(called)}
    modules = {
        path: module
        for path, module in flow.record.modules.items()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    }
    if not modules:
        raise PlanError(
            "the network has no convolution or linear layer (nn.Conv2d, nn.ConvTranspose2d, nn.Linear or a subclass), "
            "so there is nothing to binarize"
        )
    matches: dict[str, int] = {rule.match: 0 for rule in config.rules}
    layers: list[LayerPlan] = []
    for path in sorted(modules, key=lambda p: order.get(p, len(order))):
        nodes = called.get(path, [])
        layer = _describe(flow, path, modules[path], nodes)
        rule = next((rule for rule in config.rules if _matches(rule, layer, modules[path])), None)
        for each in config.rules:
            # A rule behind one that decides first still matches something: only a rule without effect is a mistake.
            matches[each.match] += _matches(each, layer, modules[path])
        reason, unusual = _default_reason(flow, layer, nodes, config), _unusual(flow, layer, modules[path])
        layers.append(_decide(layer, modules[path], reason, unusual, rule, config))
    for name, count in matches.items():
        if count == 0:
            near = difflib.get_close_matches(name, list(modules), n=4, cutoff=0.3)
            raise PlanError(
                f"rule {name!r} matches no convolution or linear layer of the network. Near names: "
                f"{', '.join(near) if near else ', '.join(list(modules)[:6]) + ' ...'}"
            )
    for node in flow.record.graph.nodes:
        if node.op == "call_function" and flow.is_layer(node):
            layers.append(_functional(flow, node))
    return layers, matches


def _functional(flow: Flow, node: fx.Node) -> LayerPlan:
    shape = flow.shape(node) or ()
    scope = scope_of(node)
    return LayerPlan(
        path=f"{scope[-1][0] if scope else ''}:{flow.name(node)}",
        kind="function",
        in_channels=0,
        out_channels=shape[1] if len(shape) > 1 else 0,
        kernel_size=(),
        stride=(),
        groups=1,
        output=tuple(shape[2:]),
        macs=0,
        calls=1,
        action="keep",
        reason=f"functional {flow.name(node)} is out of reach: its weight is not a layer's",
        eligible=False,
    )
