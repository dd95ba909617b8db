"""Which layers become binary: the defaults' reasons to keep one, and the user's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from bidensify.config import BidensifyConfig, Rule
from bidensify.errors import ConfigError, PlanError
from bidensify.methods import get_method, in_frame, no_such_bits
from bidensify.rewrite.macs import macs_of
from bidensify.rewrite.plan.entries import LayerPlan, window_of
from bidensify.rewrite.plan.flow import Flow
from bidensify.rewrite.plan.outside import Outside
from bidensify.rewrite.plan.reasons import KINDS, default_reason, unusual_layer, weight_maker
from bidensify.rewrite.plan.rules import matches_layer, rule_labels, without_match
from bidensify.rewrite.plan.times import Table, read_times, times_path
from bidensify.rewrite.record.recorded import scope_of

__all__ = ["plan_layers"]


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
        **window_of(module),
    )


def _decide(
    layer: LayerPlan, module: nn.Module, reason: str, unusual: str, rule: Rule | None, config: BidensifyConfig
) -> LayerPlan:
    method, act_scale, act_bits = config.method, config.act_scale, config.act_bits
    bypass: bool | None = None
    activation = config.activation != "keep"
    forced = ""
    if rule is not None:
        if rule.action == "keep":
            return replace(layer, action="keep", reason=f"rule {rule.match!r}", eligible=not reason)
        forced = f"rule {rule.match!r}"
        if rule.action == "int8":
            stays = unusual or ("never called in the recorded run" if layer.calls == 0 else "")
            stays = stays or (f"{layer.kind} is out of reach" if layer.kind not in KINDS else "")
            return replace(layer, action="keep", reason=stays or forced, eligible=not (reason or stays), int8=not stays)
        if isinstance(rule.action, Mapping):
            method = rule.action.get("method", method)
            act_scale = rule.action.get("act_scale", act_scale)
            act_bits = rule.action.get("act_bits", act_bits)
            bypass = rule.action.get("bypass")
            activation = rule.action.get("activation", config.activation) != "keep"
        elif rule.action != "binarize":
            method = str(rule.action)
    impossible = unusual or layer.calls == 0 or layer.kind not in KINDS
    if (reason and not forced) or impossible:
        return replace(layer, action="keep", reason=unusual or reason, eligible=False)
    found = get_method(method := in_frame(method, config))
    spec = layer.spec(module)
    kept = found.keeps(spec) if found.keeps is not None else ""
    if kept and not forced:
        return replace(layer, action="keep", reason=f"{method} keeps it: {kept}", eligible=False)
    if act_bits not in found.act_bits:
        raise ConfigError(no_such_bits(found, act_bits, layer.path))
    maker = f"; binarizes the weight that {weight_maker(module)} makes" if layer.makes_weight else ""
    return replace(
        layer,
        reason=(forced or "default") + maker,
        way="path",
        method=method,
        act_scale=act_scale,
        act_bits=act_bits,
        bypass=found.has_bypass(spec) if bypass is None else bypass,
        activation=activation and found.activation is not None,
        eligible=not reason,
    )


def _faster(layer: LayerPlan, times: Table, unmeasured: list[str]) -> LayerPlan:
    """``layer``, kept where it would be slower as bits; what has no row is added to ``unmeasured``."""
    if layer.action != "binary":
        return layer
    found = times.of(layer)
    if found is None:
        unmeasured.append(f"{layer.path} ({layer.shape})")
        return layer
    if found.saved > 0:
        return layer
    why = f"slower as bits: {found.ms['packed']:.3f} ms against {found.ms['float']:.3f} at {'×'.join(map(str, found.output))}"
    return replace(layer, action="keep", reason=why, way="", method="", bypass=False, activation=False)


def plan_layers(flow: Flow, config: BidensifyConfig) -> tuple[list[LayerPlan], dict[str, int]]:
    """Every layer with its action and reason, and how many layers each rule decided.

    Raises:
        PlanError: the network has no convolution, or with ``keep_slower`` a layer was never measured.
        ConfigError: a rule matches no layer, a method is unknown or has no activations of ``act_bits``.
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
    labels = rule_labels(config.rules)
    matches = dict.fromkeys(labels, 0)
    layers: list[LayerPlan] = []
    times = read_times() if config.keep_slower else None
    unmeasured: list[str] = []
    outside = Outside(flow)
    for path in sorted(modules, key=lambda p: order.get(p, len(order))):
        nodes = called.get(path, [])
        layer = _describe(flow, path, modules[path], nodes)
        fits = [matches_layer(rule, layer, modules[path]) for rule in config.rules]
        rule = next((rule for rule, fit in zip(config.rules, fits) if fit), None)
        for label, fit in zip(labels, fits):
            # A rule behind one that decides first still matches something: only a rule without effect is a mistake.
            matches[label] += fit
        reason = default_reason(flow, layer, nodes, config)
        unusual = unusual_layer(flow, layer, modules[path], outside)
        decided = _decide(layer, modules[path], reason, unusual, rule, config)
        layers.append(decided if times is None or rule is not None else _faster(decided, times, unmeasured))
    if unmeasured:
        raise PlanError(
            f"keep_slower: {unmeasured[0]}{f' and {len(unmeasured) - 1} more' if len(unmeasured) > 1 else ''} have no row in "
            f"{str(times_path())!r}, this machine's table of layers; measure the network first: bidensify bench NETWORK --layers"
        )
    for rule, count in zip(config.rules, matches.values()):
        if count == 0:
            raise ConfigError(without_match(rule, layers, modules))
    layers.extend(_scripted(flow))
    for node in flow.record.graph.nodes:
        if node.op == "call_function" and flow.is_layer(node):
            layers.append(_functional(flow, node))
    return layers, matches


def _scripted(flow: Flow) -> Iterator[LayerPlan]:
    for path, module in flow.record.modules.items():
        name = getattr(module, "original_name", "")
        if isinstance(module, torch.jit.ScriptModule) and name in ("Conv2d", "ConvTranspose2d", "Linear"):
            yield LayerPlan(
                path=path,
                kind="scripted",
                in_channels=int(getattr(module, "in_channels", getattr(module, "in_features", 0))),
                out_channels=int(getattr(module, "out_channels", getattr(module, "out_features", 0))),
                kernel_size=(),
                stride=(),
                groups=1,
                output=(),
                macs=0,
                calls=0,
                action="keep",
                reason="inside a scripted module, whose code is fixed",
                eligible=False,
            )


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
