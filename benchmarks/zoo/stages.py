"""Standard deviations of stages: what the untrained rewrite does to the scale of a network's activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from bidensify.nn import BinaryLayer
from bidensify.nn.used_weight import pretrained_spread
from bidensify.rewrite import Plan

__all__ = ["levelled", "ratios"]

DEPTH = 3


def _maps(value: Any) -> list[Tensor]:
    """The feature maps in an output: float tensors with room for a deviation."""
    if isinstance(value, Tensor):
        room = value.dim() >= 3 and value.numel() > value.shape[0] * value.shape[1]
        return [value] if value.is_floating_point() and room else []
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in _maps(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _maps(item)]
    return []


def _inside(path: str, stage: str) -> bool:
    return not stage or path.startswith(f"{stage}.")


def _stages(student: nn.Module, plan: Plan) -> list[str]:
    """Modules at most ``DEPTH`` below the network that hold binary layers, and the network itself.

    Not those with a layer that took over a norm from outside: there the original gives what it has not normalised yet. Nor
    those that end in a prediction: a kept layer's output is a stage's no more.
    """
    predictors = [layer.path for layer in plan.kept if layer.reason == "prediction layer"]
    return [
        path
        for path, module in student.named_modules()
        if path.count(".") < DEPTH
        and not isinstance(module, BinaryLayer)
        and any(isinstance(child, BinaryLayer) for child in module.modules())
        and not any(
            layer.norm is not None and _inside(layer.path, path) and not _inside(layer.norm, path)
            for layer in plan.binary
        )
        and not any(_inside(predictor, path) for predictor in predictors)
    ]


def _deviations(model: nn.Module, stages: list[str], run: Callable[[nn.Module], Any]) -> dict[str, float]:
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # As in training: running statistics of an untrained network say nothing.
            module.training = True
    seen: dict[str, list[float]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.setdefault(path, []).extend(float(t.float().std()) for t in _maps(output))

        return hook

    for path in stages:
        model.get_submodule(path).register_forward_hook(note(path))
    run(model)
    return {f"{path or 'output'}#{n}": value for path, values in seen.items() for n, value in enumerate(values)}


def ratios(model: nn.Module, student: nn.Module, plan: Plan, run: Callable[[nn.Module], Any]) -> dict[str, float]:
    """Stage -> deviation in the rewritten network / deviation in the original.

    Args:
        model, student: the original and the rewritten network, uncalibrated.
        plan: of the rewrite.
        run: runs a network on the example batch.
    """
    stages = _stages(student, plan)
    before, after = _deviations(model, stages, run), _deviations(student, stages, run)
    # A stage that the original holds at (nearly) 0, as a last layer that is initialised to 0, has no scale to keep.
    found = {key: after[key] / value for key, value in before.items() if key in after and value > 1e-6}
    return {key.removesuffix("#0"): value for key, value in found.items()}


def levelled(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy whose convolutions and linear layers, but for predictions, all keep the power of a white input.

    What is drawn for them by default does not: torch's layers lose two thirds of it each, its transposed convolutions of
    stride s all but 1 / (3 s * s), and transformers' layers (weights of deviation 0.02) nearly all. Where no norm follows, the
    signal of the random original dies out from layer to layer, while bypasses hand it on.
    """
    twin = copy.deepcopy(model)
    for layer in plan.layers:
        weight = None if layer.kind == "function" else twin.get_submodule(layer.path)._parameters.get("weight")
        if weight is None or layer.makes_weight or layer.reason == "prediction layer":
            continue
        transposed = layer.kind.startswith("conv_transpose")
        spread = pretrained_spread(weight, transposed=transposed, groups=layer.groups, stride=layer.stride)
        rows = weight.data.reshape(layer.groups if transposed else 1, -1, *weight.shape[1:])
        by_row = spread.view(layer.groups, 1, -1) if transposed else spread.view(1, -1, 1)
        rows /= by_row.reshape(*by_row.shape, *[1] * (rows.dim() - 3))
    return twin
