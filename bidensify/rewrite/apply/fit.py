"""Does a plan fit a network? Asked of all its parts before the first of them changes the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from bidensify.errors import PlanError
from bidensify.methods import get_method
from bidensify.nn import BinaryLayer, Int8Layer
from bidensify.rewrite.apply.start import slope_value
from bidensify.rewrite.kinds import (
    fused_activation,
    is_absorbable_norm,
    is_activation,
    is_layer_scale,
    is_norm,
)
from bidensify.rewrite.plan.entries import ActivationPlan, BlockPlan, LayerPlan, window_of
from bidensify.rewrite.plan.schema import Plan

__all__ = ["activation_of", "check_fit"]


def activation_of(method: str, path: str) -> Any:
    """What makes a method's activation.

    Raises:
        PlanError: the method has none.
        ConfigError: there is no such method.
    """
    make = get_method(method).activation
    if make is None:
        raise PlanError(f"{path}: method {method!r} has no activation; plan again")
    return make


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    if isinstance(module, nn.Linear):
        return "linear", module.in_features, module.out_features, (1,), (1,), 1
    if isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        kind = ("conv_transpose" if transposed else "conv") + f"{len(module.kernel_size)}d"
        geometry = tuple(module.kernel_size), tuple(module.stride), module.groups
        return kind, module.in_channels, module.out_channels, *geometry
    return (type(module).__name__,)


def _check_slope(path: str, source: str | None, modules: Mapping[str, nn.Module]) -> None:
    if source is not None and slope_value(modules, source) is None:
        raise PlanError(
            f"{path}: the plan's {source!r} is no PReLU or parameter of this network; it is of another model: plan again"
        )


def _check_window(layer: LayerPlan, module: nn.Module) -> None:
    for name, found in window_of(module).items():
        wanted = getattr(layer, name)
        if wanted is not None and found != wanted:
            raise PlanError(
                f"{layer.path}: the plan is for {name}={wanted!r}, the network has {found!r}; it is of another model: plan again"
            )


def _check_layer(layer: LayerPlan, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    module = modules[layer.path]
    if isinstance(module, BinaryLayer | Int8Layer):
        what = "int8" if isinstance(module, Int8Layer) else "binary"
        raise PlanError(f"{layer.path}: is {what} already; rewrite the full-precision network")
    found = _geometry(module)
    wanted = layer.kind, layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.groups
    if found != wanted:
        raise PlanError(f"{layer.path}: the plan is for {wanted}, the network has {found}; it is of another model")
    if layer.int8:
        if layer.action != "keep":
            raise PlanError(f"{layer.path}: the plan has it in int8 and in one bit; plan again")
        return
    get_method(layer.method)
    if layer.activation:
        activation_of(layer.method, layer.path)
    if module._parameters.get("weight") is None and not layer.makes_weight:
        raise PlanError(
            f"{layer.path}: its weight is not a plain parameter, but was one in the model that the plan is of: plan again"
        )
    if layer.norm is not None:
        norm = modules.get(layer.norm)
        if norm is None or not is_absorbable_norm(norm, layer.out_channels):
            raise PlanError(
                f"{layer.path}: the plan's norm {layer.norm!r} is no BatchNorm of {layer.out_channels} channels of this "
                "network; it is of another model: plan again"
            )
    if layer.layer_scale is not None:
        holder, _, name = layer.layer_scale.rpartition(".")
        scale = modules[holder]._parameters.get(name) if holder in modules else None
        if scale is None or scale.numel() != layer.out_channels:
            raise PlanError(
                f"{layer.path}: the plan's layer scale {layer.layer_scale!r} is no parameter of {layer.out_channels} values "
                "of this network; it is of another model: plan again"
            )


def _check_activation(item: ActivationPlan, module: nn.Module) -> None:
    if item.action == "norm":
        fits = fused_activation(module) is not None
    elif item.action == "absorbed":
        fits = is_activation(module) or is_norm(module) or is_layer_scale(module)
    else:
        activation_of(item.method, item.path)
        fits = is_activation(module)
    if not fits:
        raise PlanError(
            f"{item.path}: the plan's {item.action!r} does not go with a {type(module).__name__}; it is of another model: "
            "plan again"
        )


def _once(what: str, paths: list[str]) -> None:
    for path, count in Counter(paths).items():
        if count > 1:
            raise PlanError(f"{path}: the plan has it {count} times as {what}; plan again")


def check_fit(model: nn.Module, plan: Plan) -> None:
    """Checks every name, class and size of a plan against a network.

    Raises:
        PlanError: the plan is of another model; the message names the first path that does not fit.
        ConfigError: a method that is not registered.
    """
    modules = dict(model.named_modules())
    layers = [layer for layer in plan.layers if layer.kind != "function"]
    parts: list[LayerPlan | ActivationPlan | BlockPlan] = [*layers, *plan.activations, *plan.blocks]
    for path in [part.path for part in parts]:
        if path not in modules:
            raise PlanError(
                f"the plan of {plan.model_class} names {path!r}, which this network does not have; it is of another model: "
                "plan again"
            )
    _once("a layer", [layer.path for layer in layers])
    _once("an activation", [item.path for item in plan.activations])
    _once("a block", [block.path for block in plan.blocks])
    _once("a norm", [layer.norm for layer in plan.binary if layer.norm is not None])
    for layer in [*plan.binary, *plan.int8]:
        _check_layer(layer, model, modules)
    for layer in layers:
        # A layer that stays computes as the network has it; trained with other windows, it would give something else.
        _check_window(layer, modules[layer.path])
    for item in plan.activations:
        _check_activation(item, modules[item.path])
    for layer in plan.binary:
        _check_slope(layer.path, layer.slope_from, modules)
    for block in plan.blocks:
        for new in block.modules.values():
            _check_slope(block.path, new.slope_from, modules)
            activation_of(new.method, block.path)
