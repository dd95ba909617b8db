"""Apply a plan in place: no data, no forward pass; the meta device is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bidensify._util.listeners import announce
from bidensify._util.seeding import seeded
from bidensify.config import BidensifyConfig
from bidensify.errors import PlanError
from bidensify.methods import LayerSpec, get_method
from bidensify.nn import BinaryLayer, Bypass, ByWidth, RPReLU, make_binary
from bidensify.nn.used_weight import used_weight
from bidensify.rewrite.apply.norms import centre, new_norm, taken_norm
from bidensify.rewrite.blocks.edit import apply_edits
from bidensify.rewrite.blocks.generated import become, without_hooks
from bidensify.rewrite.plan.schema import ActivationPlan, LayerPlan, Plan
from bidensify.rewrite.record.untouched import forget_unreal

__all__ = ["StateDictAdapter", "apply_plan"]


class StateDictAdapter:
    """Lets a full-precision state_dict of the original network load into the rewritten one.

    Attributes:
        renamed: key of the original -> key of the rewritten network, or None for a value that it no longer holds.
        added: keys that the rewrite added; an original state_dict has none of them, and they keep their values.
    """

    def __init__(self, renamed: Mapping[str, str | None], added: list[str]) -> None:
        self.renamed = dict(renamed)
        self.added = list(added)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
        """The pre-hook of ``load_state_dict``; it changes torch's own shallow copy of the dict."""
        if any(prefix + key in state_dict for key in self.added):
            return
        for old, new in self.renamed.items():
            if prefix + old in state_dict:
                value = state_dict.pop(prefix + old)
                if new is not None:
                    state_dict[prefix + new] = value
        own = module.state_dict()
        for key in self.added:
            if key in own:
                state_dict.setdefault(prefix + key, own[key])


def _require(modules: Mapping[str, nn.Module], path: str, plan: Plan) -> nn.Module:
    if path not in modules:
        raise PlanError(
            f"the plan of {plan.model_class} names {path!r}, which this network does not have; it is of another model: "
            "plan again"
        )
    return modules[path]


def _check_layer(layer: LayerPlan, module: nn.Module) -> None:
    if isinstance(module, BinaryLayer):
        raise PlanError(f"{layer.path}: is binary already; rewrite the full-precision network")
    if isinstance(module, nn.Linear):
        facts: tuple[Any, ...] = ("linear", module.in_features, module.out_features, (1,))
    elif isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        kind = ("conv_transpose" if transposed else "conv") + f"{len(module.kernel_size)}d"
        facts = (kind, module.in_channels, module.out_channels, tuple(module.kernel_size))
    else:
        facts = (type(module).__name__,)
    wanted = (layer.kind, layer.in_channels, layer.out_channels, tuple(layer.kernel_size))
    if facts != wanted:
        raise PlanError(f"{layer.path}: the plan is for {wanted}, the network has {facts}; it is of another model")


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _start_weight(layer: LayerPlan, module: nn.Module, config: BidensifyConfig) -> Tensor:
    """The float weight that the layer convolves with now; drawn anew first where the configuration says so."""
    parameter = module._parameters.get("weight")
    if parameter is None and not layer.makes_weight:
        raise PlanError(
            f"{layer.path}: its weight is not a plain parameter, but was one in the model that the plan is of: plan again"
        )
    if config.weights == "fresh":
        start = torch.empty_like(used_weight(module) if parameter is None else parameter)
        nn.init.kaiming_uniform_(start, a=5**0.5)
        if parameter is not None:
            parameter.copy_(start)
        elif parametrize.is_parametrized(module, "weight"):
            _assign(layer, module, start)
        else:
            raise PlanError(
                f"{layer.path}: a hook makes its weight, so that weights='fresh' cannot draw it; use "
                "torch.nn.utils.parametrizations instead of the old torch.nn.utils hooks, or weights='pretrained'"
            )
    if layer.makes_weight:
        return used_weight(module)
    assert parameter is not None
    return parameter


def _assign(layer: LayerPlan, module: nn.Module, weight: Tensor) -> None:
    try:
        module.weight = weight
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise PlanError(
            f"{layer.path}: its parametrization takes no new weight ({error}), which weights='fresh' asks for; use "
            "weights='pretrained', or keep the layer by a rule"
        ) from error


def _exchange(model: nn.Module, layer: LayerPlan, modules: Mapping[str, nn.Module], config: BidensifyConfig) -> None:
    module = modules[layer.path]
    method = get_method(layer.method)
    dim = -1 if layer.kind == "linear" else 1
    latent = _start_weight(layer, module, config)
    spec = LayerSpec(layer.kind, layer.in_channels, layer.out_channels, layer.groups, dim)
    parts = method.parts(spec, dataclasses.replace(config, act_scale=layer.act_scale))
    norm: nn.Module = taken_norm(modules[layer.norm]) if layer.norm is not None else new_norm(layer, module, latent)
    if layer.layer_scale is not None:
        holder, name = _owner(model, layer.layer_scale)
        gamma = holder._parameters[name]
        assert gamma is not None
        with torch.no_grad():
            for parameter in (norm.weight, norm.bias):
                parameter.mul_(gamma.reshape(-1))  # type: ignore[operator]
        holder._parameters[name] = None
    bypass = None
    if layer.bypass:
        if isinstance(module, nn.modules.conv._ConvNd):
            bypass = Bypass(
                layer.in_channels, layer.out_channels, module.kernel_size, module.stride, module.padding,
                module.dilation, transposed=layer.kind == "conv_transpose2d",
            )  # fmt: skip
        else:
            bypass = Bypass(layer.in_channels, layer.out_channels, dim=-1)
    activation = None
    if layer.activation and method.activation is not None:
        activation = method.activation(layer.out_channels, dim).to(device=latent.device, dtype=latent.dtype)
        if isinstance(activation, RPReLU):
            centre(activation, norm, bypass=layer.bypass)
    module.__class__ = make_binary(type(module))
    assert isinstance(module, BinaryLayer)
    module.install(
        binarizer=parts.binarizer.to(device=latent.device, dtype=latent.dtype),
        weight_binarizer=parts.weight_binarizer,
        norm=norm,
        bypass=bypass,
        activation=activation,
        method=layer.method,
        makes_weight=layer.makes_weight,
    )
    for part in (module.binarizer, module.weight_binarizer, module.bypass, module.activation):
        if part is not None:
            part.train(module.training)


def _apply_activation(item: ActivationPlan, module: nn.Module, like: Tensor) -> None:
    if item.action == "replace":
        make = get_method(item.method).activation
        if make is None:
            raise PlanError(f"{item.path}: method {item.method!r} has no activation; plan again")
        become(module, make(item.channels, item.dim).to(device=like.device, dtype=like.dtype))
    elif item.action == "by_width":
        make = get_method(item.method).activation
        if make is None:
            raise PlanError(f"{item.path}: method {item.method!r} has no activation; plan again")
        activations = {width: make(width, item.dim).to(device=like.device, dtype=like.dtype) for width in item.widths}
        become(module, ByWidth(without_hooks(module), activations, item.dim).train(module.training))
    elif item.action == "absorbed":
        become(module, nn.Identity())
    elif item.action == "norm":
        inner = module.act
        assert isinstance(inner, nn.Module)
        become(module, nn.Sequential(inner))
    else:
        raise PlanError(f"{item.path}: unknown action {item.action!r} in the plan")


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Rewrites ``model`` in place as ``plan`` says and returns it.

    The result is the same for the same model and plan, in any process: what is drawn at random is drawn from a fixed
    seed, and the global RNG state is left alone.

    Args:
        model: the full-precision network that the plan was made for; on any device, meta included.
        plan: from ``bidensify.plan``, or ``Plan.from_dict``.

    Raises:
        PlanError: the plan is of another model; the message names the first path that does not fit. The model is
            unchanged then.
    """
    modules = dict(model.named_modules())
    for layer in plan.layers:
        if layer.kind != "function":
            module = _require(modules, layer.path, plan)
            if layer.action == "binary":
                _check_layer(layer, module)
                if layer.norm is not None:
                    _require(modules, layer.norm, plan)
    for item in plan.activations:
        _require(modules, item.path, plan)
    before = set(model.state_dict())
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    with seeded(0), torch.no_grad():
        for block in plan.blocks:
            module = _require(modules, block.path, plan)
            children = {}
            # In the edits' order, which a JSON file keeps: an optimizer's state goes by the order of the parameters.
            for name in (edit.module for edit in block.edits if edit.action == "module"):
                channels, dim, method = block.modules[name]
                make = get_method(method).activation
                entry = isinstance(module, nn.Sequential) and name in module._modules
                if make is None or (hasattr(module, name) and not entry):
                    raise PlanError(f"{block.path}: cannot add an activation named {name!r}; plan again")
                child = make(channels, dim).to(device=reference.device, dtype=reference.dtype)
                children[name] = child.train(module.training)
            apply_edits(module, block.path, block.varying, dict(block.constants), block.edits, children)
        for layer in plan.layers:
            if layer.action == "binary":
                _exchange(model, layer, modules, plan.config)
        for item in plan.activations:
            _apply_activation(item, modules[item.path], reference)
    if plan.blocks:
        forget_unreal()
    _adapt_state_dict(model, plan, before)
    model.bidensify_plan = plan  # type: ignore[assignment]
    announce(model)
    return model


def _adapt_state_dict(model: nn.Module, plan: Plan, before: set[str]) -> None:
    after = set(model.state_dict())
    renamed: dict[str, str | None] = dict.fromkeys(before - after)
    for layer in plan.binary:
        if layer.norm is not None:
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                if f"{layer.norm}.{name}" in renamed:
                    renamed[f"{layer.norm}.{name}"] = f"{layer.path}.norm.{name}"
        elif f"{layer.path}.bias" in renamed and layer.layer_scale is None:
            renamed[f"{layer.path}.bias"] = f"{layer.path}.norm.bias"
    for item in plan.activations:
        if item.action == "by_width":
            for name in [name for name in renamed if name.startswith(f"{item.path}.")]:
                renamed[name] = f"{item.path}.original.{name[len(item.path) + 1 :]}"
    taken = {new for new in renamed.values() if new is not None}
    adapter = StateDictAdapter(renamed, sorted(after - before))
    # A norm's taken-over values come from the original's keys, so only what is really new keeps its own value.
    assert taken <= after
    model.register_load_state_dict_pre_hook(adapter)  # type: ignore[no-untyped-call]
