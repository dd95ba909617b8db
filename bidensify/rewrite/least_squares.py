"""``bidensify.fit_scales``: what calibration can do beyond thresholds, without training: scales by least squares, layer by layer.

A binary layer's signs stay; its scale and shift per output channel are those whose result is nearest to what the full-precision
network has at that point, each layer on what the layers before it then give. The prediction layers, which stay in float, are
regressed as a whole. This is no training, and no stand-in for it: one-bit signs of weights that were never meant to be signs
keep little, whatever their scales (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bidensify._util.modes import evaluation_flags
from bidensify.errors import ConfigError
from bidensify.nn import BinaryLayer, RPReLU, calibrate, int8_layers, state_of
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.plan.schema import Plan

__all__ = ["fit_scales"]

_RIDGE = 1e-6
_WIDEST = 8192
_LEAST_SLOPE = 0.05


def fit_scales(student: nn.Module, teacher: nn.Module, batches: Iterable[Tensor]) -> None:
    """Calibrates a student, then fits scale and shift of each binary layer and the prediction layers to its teacher.

    With y a layer's result before its norm, b its bypass and t what the full-precision network has behind the norm (and behind
    the residual add that the layer replaces), each output channel's scale g and shift s are those of least
    (g · y + s + b - t)², over all pixels of all batches: the norm's parameters hold them. Where b joins behind the activation,
    g · y + s is to be what the activation makes into its value of t less b. Thresholds are found anew in the same
    pass (each channel's signs mixed): no least squares is known for them that a pass could solve. A layer whose norm is no
    BatchNorm with an affine stays as calibrated. What a prediction layer is regressed by is what it reads.

    Args:
        student: a latent network that ``bidensify`` made; changed in place.
        teacher: the full-precision network that it was made from.
        batches: images (N, C, H, W), dozens at least.

    Raises:
        ConfigError: the student is not latent, the teacher not of the same network or not in full precision, or no batch.
    """
    plan = getattr(student, "bidensify_plan", None)
    if state_of(student) != "latent" or not isinstance(plan, Plan):
        raise ConfigError(
            f"fit_scales: the student is {state_of(student)}; give a latent network that bidensify() made"
        )
    if state_of(teacher) != "float":
        raise ConfigError(f"fit_scales: the teacher is {state_of(teacher)}; give the full-precision network")
    images, modules = list(batches), dict(teacher.named_modules())
    missing = [layer.path for layer in plan.layers if layer.kind != "function" and layer.path not in modules]
    if missing:
        raise ConfigError(
            f"fit_scales: the teacher has no layer {missing[0]!r}; give the network the student was made from"
        )
    calibrate(student, images)
    with torch.no_grad(), evaluation_flags(student), evaluation_flags(teacher):
        _fit_layers(student, teacher, plan, images)
        _fit_predictions(student, teacher, plan, images)


class _Targets:
    """What the full-precision network gives where each binary layer stands, of the last batch that it ran on."""

    def __init__(self, teacher: nn.Module, plan: Plan, stack: ExitStack) -> None:
        self.modules = dict(teacher.named_modules())
        self.found: dict[str, list[Tensor]] = {}
        self.entered: dict[str, Tensor] = {}
        self.blocks = [block.path for block in plan.blocks]
        for path in self.blocks:
            stack.callback(self.modules[path].register_forward_pre_hook(self._enter(path)).remove)
        for layer in plan.binary:
            stack.callback(self.modules[layer.path].register_forward_hook(self._note(layer)).remove)

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.entered[path] = args[0]

        return hook

    def _note(self, layer: LayerPlan) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            target = output
            if layer.norm is not None:
                # Not the module itself: it may have an activation of its own behind it.
                norm = cast(Any, self.modules[layer.norm])
                values = norm.running_mean, norm.running_var, norm.weight, norm.bias
                target = nn.functional.batch_norm(output, *values, training=False, eps=norm.eps)
            if layer.layer_scale is not None:
                holder, _, name = layer.layer_scale.rpartition(".")
                gamma = cast(Tensor, getattr(self.modules[holder], name)).reshape(-1)
                target = target * (gamma if layer.kind == "linear" else gamma.view(-1, 1, 1))
            if layer.replaces_add:
                inside = [path for path in self.blocks if path == "" or layer.path.startswith(f"{path}.")]
                shortcut = self.entered.get(max(inside, key=len)) if inside else None
                if shortcut is not None and shortcut.shape == target.shape:
                    target = target + shortcut
            if target is output:
                # An activation behind it may work in place.
                target = output.clone()
            self.found.setdefault(layer.path, []).append(target)

        return hook


def _behind(activation: nn.Module, target: Tensor, side: Tensor) -> Tensor:
    """What an activation has to be given so that with ``side`` it comes to what it gives for ``target``."""
    if not isinstance(activation, RPReLU):
        return target
    shape = (-1,) if activation.dim == -1 else (-1, *[1] * (target.dim() - 2))
    before, slope, after = (p.view(shape) for p in (activation.bias_in, activation.slope, activation.bias_out))
    left = activation(target) - side - after
    # Slopes near 0 have no inverse: what is asked for there is not to be had.
    return torch.where(left >= 0, left, left / slope.clamp(min=_LEAST_SLOPE)) - before


class _Fit:
    """The running sums of one layer, and its norm set by them at each call."""

    def __init__(self, layer: BinaryLayer, norm: _BatchNorm, targets: list[Tensor]) -> None:
        self.layer, self.norm, self.targets = layer, norm, targets
        self.sums: Tensor | None = None
        self.x: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.x = args[0]

    def solve(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        y, target, dim = args[0], self.targets.pop(0), self.layer.binarizer.dim
        bypass = cast(Any, self.layer.bypass)
        if bypass is not None:
            assert self.x is not None
            side = bypass(self.x, y.shape[-2:] if bypass.dim == 1 else None)
            target = _behind(self.layer.activation, target, side) if self.layer.activation_first else target - side
        ours, theirs = (value.movedim(dim, 0).flatten(1).double() for value in (y, target))
        count = torch.full_like(ours[:, 0], ours.shape[1])
        found = torch.stack([count, ours.sum(1), theirs.sum(1), ours.square().sum(1), (ours * theirs).sum(1)])
        self.sums = found if self.sums is None else self.sums + found
        norm = cast(Any, self.norm)
        mean, wanted, square, product = self.sums[1:] / self.sums[0]
        variance = (square - mean.square()).clamp(min=0)
        # A channel that is constant gets the shift alone.
        scale = torch.where(variance > 1e-12, (product - mean * wanted) / variance.clamp(min=1e-12), 0.0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.bias.copy_(wanted)


def _fit_layers(student: nn.Module, teacher: nn.Module, plan: Plan, images: list[Tensor]) -> None:
    ranges = [layer.int8 for _, layer in int8_layers(student) if layer.int8 is not None]
    layers = {layer.path: cast(BinaryLayer, student.get_submodule(layer.path)) for layer in plan.binary}
    with ExitStack() as stack:
        targets = _Targets(teacher, plan, stack)
        parts: list[Any] = [layer.binarizer for layer in layers.values()]
        for part in [*parts, *ranges]:
            part.begin_calibration()
            stack.callback(part.end_calibration)
        for path, layer in layers.items():
            norm = layer.norm
            if isinstance(norm, _BatchNorm) and norm.affine and norm.track_running_stats:
                fit = _Fit(layer, norm, targets.found.setdefault(path, []))
                stack.callback(layer.register_forward_pre_hook(fit.enter).remove)
                stack.callback(norm.register_forward_pre_hook(fit.solve).remove)
        for x in images:
            for found in targets.found.values():
                found.clear()
            teacher(x)
            student(x)


def _fit_predictions(student: nn.Module, teacher: nn.Module, plan: Plan, images: list[Tensor]) -> None:
    """Regresses what the teacher's prediction layers give on what the student's read, with a little of a ridge."""
    for entry in plan.kept:
        layer = student.get_submodule(entry.path)
        if entry.reason != "prediction layer" or not isinstance(layer, nn.Conv2d) or not _regressible(layer):
            continue
        read: list[Tensor] = []
        wanted: list[Tensor] = []
        sums: tuple[Tensor, Tensor] | None = None
        with ExitStack() as stack:
            stack.callback(layer.register_forward_pre_hook(lambda _, args: read.append(args[0])).remove)  # noqa: B023
            twin = teacher.get_submodule(entry.path)
            stack.callback(twin.register_forward_hook(lambda *given: wanted.append(given[2].clone())).remove)  # noqa: B023
            for x in images:
                read.clear()
                wanted.clear()
                teacher(x)
                student(x)
                for features, target in zip(read, wanted, strict=True):
                    found = _normal_equations(layer, features, target)
                    sums = found if sums is None else (sums[0] + found[0], sums[1] + found[1])
        if sums is None:
            continue
        gram, product = sums
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram + ridge, product)
        layer.weight.copy_(solution[: layer.weight[0].numel()].T.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(solution[-1])


def _regressible(layer: nn.Conv2d) -> bool:
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and "weight" in layer._parameters and layer.weight[0].numel() <= _WIDEST


def _normal_equations(layer: nn.Conv2d, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    options: Mapping[str, Any] = {name: getattr(layer, name) for name in ("dilation", "padding", "stride")}
    rows = nn.functional.unfold(features, layer.kernel_size, **options).transpose(1, 2).flatten(0, 1).double()
    if layer.bias is not None:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return rows.T @ rows, rows.T @ target.movedim(1, -1).flatten(0, 2).double()
