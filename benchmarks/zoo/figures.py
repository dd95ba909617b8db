"""Checks that measure: the scale of stages, the share of mixed signs, and packed layers beside latent ones."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import bidensify as bd
from bidensify.nn import binary_layers
from zoo import stages
from zoo.subject import ABSENT, PASS, Subject, outputs_of, require, structure

__all__ = ["check_pack", "check_scale", "check_signs"]


def check_scale(subject: Subject) -> dict[str, Any]:
    """Standard deviation of every stage of the untrained rewrite against the original's, with batch statistics.

    Where one is outside of the range, also with ``stages.levelled``'s original: "level_low" and "level_high".
    """
    ratios = stages.ratios(subject.model, subject.student, subject.plan, subject.run)
    if not ratios:
        return {"status": ABSENT}
    low, high = min(ratios, key=lambda p: ratios[p]), max(ratios, key=lambda p: ratios[p])
    result = {"low": round(ratios[low], 2), "high": round(ratios[high], 2), "low_at": low, "high_at": high}
    inside = ratios[low] >= 0.25 and ratios[high] <= 4
    message = f"{low} has {ratios[low]:.2f} and {high} {ratios[high]:.2f} times the original's deviation"
    if not inside:
        level = stages.levelled(subject.model, subject.plan)
        student = bd.bidensify(level, example_inputs=subject.example, verify=False)
        ratios = stages.ratios(level, student, student.bidensify_plan, subject.run)  # type: ignore[arg-type]
        result.update(level_low=round(min(ratios.values()), 2), level_high=round(max(ratios.values()), 2))
        message += (
            f"; {result['level_low']:.2f} to {result['level_high']:.2f} times, where the original's random layers keep the "
            "signal's power"
        )
    return {"status": PASS if inside else message, **result}


def check_signs(subject: Subject) -> dict[str, Any]:
    """After calibration on the batch, the share of binarizer channels with 5 % to 95 % of +1 on that batch."""
    student = copy.deepcopy(subject.student)
    bd.calibrate(student, [subject.example])
    layers = dict(binary_layers(student))
    mixed: Counter[str] = Counter()
    channels: Counter[str] = Counter()
    paths = {id(layer.binarizer): path for path, layer in layers.items()}
    shares: dict[str, list[Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            x = args[0]
            beta = module.codes(x)[0]
            other = [d for d in range(x.dim()) if d != module.dim % x.dim()]
            shares.setdefault(path, []).append((x >= beta).float().mean(other))

        return hook

    hooks = [layer.binarizer.register_forward_pre_hook(note(paths[id(layer.binarizer)])) for layer in layers.values()]
    subject.run(student.eval())
    for each in hooks:
        each.remove()
    for path, calls in shares.items():
        share = torch.stack(calls).mean(0)
        channels[path] = share.numel()
        mixed[path] = int(((share >= 0.05) & (share <= 0.95)).sum())
    part = sum(mixed.values()) / max(1, sum(channels.values()))
    worst = sorted(channels, key=lambda p: mixed[p] - channels[p])[:3]
    message = f"{100 * part:.1f} % of channels have mixed signs; worst: " + ", ".join(
        f"{path} {mixed[path]} of {channels[path]}" for path in worst
    )
    return {"status": PASS if part >= 0.95 else message, "share": round(part, 4)}


def check_pack(subject: Subject) -> dict[str, Any]:
    """Packs, and gives each packed layer what its latent twin saw: the largest difference, as a share of the largest value."""
    student = copy.deepcopy(subject.student)
    # Thresholds are midpoints or values of the batch that they were set on, so ties are the rule on that very batch: the
    # comparison runs on another one.
    bd.calibrate(student, [_mirrored(subject.example)])
    student.eval()
    packed = bd.pack(student)
    worst, where = 0.0, ""
    with outputs_of(student, {id(m): path for path, m in binary_layers(student)}) as seen:
        subject.run(student)
    with torch.no_grad():
        for path, calls in seen.items():
            for args, output in calls[:1]:
                got = packed.get_submodule(path)(*args)
                gap = ((got - output).abs().max() / output.abs().max().clamp(min=1e-6)).item()
                worst, where = max((worst, where), (gap, path))
    now = structure(subject.run(packed))
    require(now == structure(subject.expected), f"the packed network's output is {now}")
    return {"status": PASS if worst <= 1e-4 else f"{where} differs by {worst:.2g}", "worst": float(f"{worst:.1e}")}


def _mirrored(value: Any) -> Any:
    if isinstance(value, Tensor):
        return 0.9 * value.flip(-1) + 0.05 if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _mirrored(item) for key, item in value.items()}
    return tuple(_mirrored(item) for item in value) if isinstance(value, (tuple, list)) else value
