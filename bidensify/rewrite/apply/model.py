"""Apply a plan in place: no data, no forward pass; the meta device is enough."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor, fx, nn

from bidensify._util.listeners import announce
from bidensify._util.seeding import seeded
from bidensify.config import BidensifyConfig
from bidensify.errors import PlanError
from bidensify.methods import get_method
from bidensify.nn import BinaryLayer, Bypass, ByWidth, Int8Layer, make_binary, make_int8
from bidensify.rewrite.apply.fit import activation_of, check_fit
from bidensify.rewrite.apply.norms import taken_norm
from bidensify.rewrite.apply.start import slope_value, start, start_slope, takes_slope
from bidensify.rewrite.apply.state_dict import StateDictAdapter, inside
from bidensify.rewrite.blocks.edit import EditedBlock, edited
from bidensify.rewrite.blocks.generated import become, without_hooks
from bidensify.rewrite.blocks.signature import fit
from bidensify.rewrite.kinds import fused_activation
from bidensify.rewrite.plan.entries import ActivationPlan, BlockPlan, LayerPlan, slope_fields
from bidensify.rewrite.plan.fusing import Refusal, fusing
from bidensify.rewrite.plan.schema import Plan
from bidensify.rewrite.record.restore import clear_fake_caches
from bidensify.rewrite.weights import shares_weight

__all__ = ["apply_plan"]


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _exchange(model: nn.Module, layer: LayerPlan, modules: Mapping[str, nn.Module], config: BidensifyConfig) -> None:
    module = modules[layer.path]
    method = get_method(layer.method)
    gamma: Tensor | None = None
    if layer.layer_scale is not None:
        holder, name = _owner(model, layer.layer_scale)
        gamma, holder._parameters[name] = holder._parameters[name], None
    taken = None if layer.norm is None else taken_norm(modules[layer.norm])
    norm, parts, activation, latent = start(
        layer,
        module,
        taken,
        gamma,
        config,
        draw=not shares_weight(module, modules.values()),
        slope=slope_value(modules, layer.slope_from),
    )
    bypass = None
    if layer.bypass:
        if isinstance(module, nn.modules.conv._ConvNd):
            bypass = Bypass(
                layer.in_channels, layer.out_channels, module.kernel_size, module.stride, module.padding,
                module.dilation, transposed=layer.kind == "conv_transpose2d",
            )  # fmt: skip
        else:
            bypass = Bypass(layer.in_channels, layer.out_channels, dim=-1)
    module.__class__ = make_binary(type(module))
    assert isinstance(module, BinaryLayer)
    module.install(
        binarizer=parts.binarizer.to(device=latent.device, dtype=latent.dtype),
        weight_binarizer=parts.weight_binarizer.to(device=latent.device, dtype=latent.dtype),
        norm=norm,
        bypass=bypass,
        activation=activation,
        method=layer.method,
        makes_weight=layer.makes_weight,
        activation_first=method.activation_first,
    )
    for part in (module.binarizer, module.weight_binarizer, module.bypass, module.activation):
        if part is not None:
            part.train(module.training)


def _round(module: nn.Module) -> None:
    module.__class__ = make_int8(type(module))
    assert isinstance(module, Int8Layer)
    module.install_int8()


def _apply_activation(item: ActivationPlan, module: nn.Module, like: Tensor) -> None:
    def make(channels: int) -> nn.Module:
        made: nn.Module = activation_of(item.method, item.path)(channels, item.dim)
        made = made.to(device=like.device, dtype=like.dtype)
        start_slope(made, item.method, slope_value({"": module}, ""))
        start_slope(made, item.method, slope_fields(module, "").get("slope"))
        return made

    if item.action == "replace":
        become(module, make(item.channels))
    elif item.action == "by_width":
        activations = {width: make(width) for width in item.widths}
        become(module, ByWidth(without_hooks(module), activations, item.dim).train(module.training))
    elif item.action == "absorbed":
        become(module, nn.Identity())
    else:
        become(module, nn.Sequential(fused_activation(module)))  # type: ignore[arg-type]


def _edited(block: BlockPlan, modules: Mapping[str, nn.Module], like: Tensor, exchanged: Set[str]) -> EditedBlock:
    module = modules[block.path]
    children: dict[str, nn.Module] = {}
    # In the edits' order, which a JSON file keeps: an optimizer's state goes by the order of the parameters.
    for name in (edit.module for edit in block.edits if edit.action == "module"):
        if name not in block.modules or name in children:
            raise PlanError(f"{block.path}: the plan's new activation {name!r} is not described once; plan again")
        new = block.modules[name]
        child: nn.Module = activation_of(new.method, block.path)(new.channels, new.dim)
        child = child.to(device=like.device, dtype=like.dtype).train(module.training)
        found = slope_value(modules, new.slope_from)
        start_slope(child, new.method, new.slope if found is None else found)
        children[name] = child
    arguments = fit(module, block.varying, block.constants)
    return edited(module, block.path, arguments, block.attributes, block.edits, children, exchanged)


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
        ConfigError: a method that is not registered.
    """
    check_fit(model, plan)
    modules = dict(model.named_modules())
    before = set(model.state_dict())
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    exchanged = {layer.path for layer in plan.binary} | {item.path for item in plan.activations}
    slopes = _slopes(plan, modules, before)
    with seeded(0), torch.no_grad():
        for block in [_edited(block, modules, reference, exchanged) for block in plan.blocks]:
            block.install()
        for layer in plan.binary:
            _exchange(model, layer, modules, plan.config)
        for layer in plan.int8:
            _round(modules[layer.path])
        for item in plan.activations:
            _apply_activation(item, modules[item.path], reference)
    if plan.blocks:
        clear_fake_caches()
    for path, name in fusing(modules, plan.binary):
        modules[path].__dict__[name] = Refusal(f"{path}.{name}()")
    _adapt_state_dict(model, plan, before, slopes)
    model.bidensify_plan = plan  # type: ignore[assignment]
    if isinstance(model, fx.GraphModule):
        # A copy of a graph module keeps what is in its ``meta``, not its attributes.
        model.meta["bidensify_plan"] = plan
    announce(model)
    return model


def _adapt_state_dict(model: nn.Module, plan: Plan, before: set[str], slopes: Mapping[str, str]) -> None:
    after = set(model.state_dict())
    renamed: dict[str, str | None] = dict.fromkeys(before - after)
    for layer in plan.binary:
        if layer.norm is not None:
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                if inside(layer.norm, name) in renamed:
                    renamed[inside(layer.norm, name)] = inside(layer.path, f"norm.{name}")
        elif inside(layer.path, "bias") in renamed:
            renamed[inside(layer.path, "bias")] = inside(layer.path, "norm.bias")
    for item in plan.activations:
        if item.action == "by_width":
            for name in [name for name in renamed if name.startswith(f"{item.path}.")]:
                renamed[name] = f"{item.path}.original.{name[len(item.path) + 1 :]}"
    # A norm's taken-over values come from the original's keys, so only what is really new keeps its own value.
    assert {new for new in renamed.values() if new is not None} <= after
    adapter = StateDictAdapter(renamed, sorted(after - before), plan.binary, plan.config, before, slopes)
    model.register_load_state_dict_pre_hook(adapter)  # type: ignore[no-untyped-call]


def _slopes(plan: Plan, modules: Mapping[str, nn.Module], original: Set[str]) -> dict[str, str]:
    """Key of an RPReLU's slope -> the original's key that it starts from; of what no layer takes in."""
    found: dict[str, tuple[str, str]] = {}
    for item in plan.activations:
        if item.action == "replace":
            found[inside(item.path, "slope")] = item.method, item.path
        for width in item.widths:
            found[inside(item.path, f"widths.{width}.slope")] = item.method, item.path
    for block in plan.blocks:
        for name, new in block.modules.items():
            if new.slope_from is not None:
                found[inside(block.path, f"{name}.slope")] = new.method, new.slope_from
    keys = {
        slope: next((key for key in (path, inside(path, "weight")) if key in original), None)
        for slope, (method, path) in found.items()
        if takes_slope(method) and slope_value(modules, path) is not None
    }
    return {slope: key for slope, key in keys.items() if key is not None}
