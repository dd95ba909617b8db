"""The levers of ``levers.py``: each a change of the ablation's recipe, or one of ``lever_parts.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lever_parts import (
    Clipped,
    Damped,
    Frozen,
    Mixed,
    both,
    branches,
    bypass_gain,
    in_order,
    leaky,
    no_bypass,
    rectified,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

Sample = dict[str, Tensor]
After = Callable[[], None]


@dataclass(frozen=True)
class Lever:
    """One change.

    Attributes:
        text: what it is.
        recipe: path -> value, as ``bidensify finetune --set`` has it.
        start: changes the untrained student in place.
        after_step: of a student, what follows each optimizer step.
        data: wraps the training set.
    """

    text: str
    recipe: dict[str, Any] = field(default_factory=dict)
    start: Callable[[nn.Module], None] | None = None
    after_step: Callable[[nn.Module], After] | None = None
    data: Callable[[Dataset[Sample]], Dataset[Sample]] | None = None


def rates(first: float, second: float | None = None) -> dict[str, Any]:
    """Another learning rate of both stages."""
    return {"stages.0.lr": first, "stages.1.lr": first if second is None else second}


def lengths(first: int, second: int) -> dict[str, Any]:
    """Other lengths of the stages."""
    return {"stages.0.epochs": first, "stages.1.epochs": second}


# The scenes' U-Net: its latent weights, its activations' parameters.
LATENT = ("encoder.*.conv?.weight", "encoder.*.downsample.0.weight", "decoder.*.conv?.0.weight")
RPRELU = ("*.slope", "*.bias_in", "*.bias_out")
FEATURES = {"weight": 1.0, "kind": "attention", "layers": ["decoder.0", "decoder.1", "decoder.2"]}
# Where the first stage ends.
SECOND = 4 / 14
# The rate that won; levers from here on are changes of it.
FAST = rates(6e-3)
ONE = {**FAST, "stages.0.binarize": "all", "stages.0.schedule": "constant"}

LEVERS: dict[str, Lever] = {
    "default": Lever("lr 3e-3 then 2e-3, 4 epochs of binary activations, 10 of all"),
    "lr 6e-3": Lever("6e-3 in both stages", FAST),
    "lr 1e-2": Lever("1e-2 in both stages", rates(1e-2)),
    "lr 2e-2": Lever("2e-2 in both stages", rates(2e-2)),
    "branches x 0.5": Lever("every binary branch's gain halved at the start", FAST, branches(0.5)),
    "branches x 0.3": Lever("times 0.3", FAST, branches(0.3)),
    "residual double": Lever("adds stay and every bypass too", {**FAST, "binarize.residual": "double"}),
    "the paper's order": Lever("the bypass joins before the activation", {**FAST, "binarize.method": "bidense-in-paper"}),
    "batch 8": Lever("batches of 8: twice the steps on the same images", {**FAST, "data.batch_size": 8}),
    "residual double, batch 8": Lever("both", {**FAST, "binarize.residual": "double", "data.batch_size": 8}),
    "teacher at first, gain learned, batch 8": Lever(
        "both",
        {**FAST, "binarize.residual": "double", "data.batch_size": 8},
        both([rectified(0.0), bypass_gain(None)]),
    ),
    "one stage": Lever(
        "14 epochs with everything binary", {**FAST, "stages.0.binarize": "all", "stages.0.schedule": "cosine"}
    ),
    "first stage of 7": Lever("7 epochs of binary activations, 7 of all", {**FAST, **lengths(7, 7)}),
    "first stage of 10": Lever("10 and 4", {**FAST, **lengths(10, 4)}),
    "ReLU at first": Lever("RPReLU starts with slope 0 and no shift", FAST, rectified(0.0)),
    "ReLU at first, batch 8": Lever("both", {**FAST, "data.batch_size": 8}, rectified(0.0)),
    "slope 0 at first": Lever("RPReLU starts with slope 0 (default 0.25) and the shift that centres it", FAST, leaky(0.0)),
    "slope 0.1 at first": Lever("the same with 0.1", FAST, leaky(0.1)),
    "no shift at first": Lever("RPReLU starts with slope 0.25 and no shift", FAST, rectified(0.25)),
    "teacher at first, gain learned": Lever(
        "adds stay; bypasses have a learned gain per channel that starts at 0, RPReLU slope 0: with float layers the student "
        "starts as the teacher",
        {**FAST, "binarize.residual": "double"}, both([rectified(0.0), bypass_gain(None)]),
    ),
    "teacher at first, no bypass": Lever(
        "adds stay; no layer has a bypass, RPReLU slope 0: the same start, and no gain to learn",
        {**FAST, "binarize.residual": "double"}, both([rectified(0.0), no_bypass]),
    ),
    "residual double, ReLU at first": Lever(
        "both; the student does not start as the teacher, for the bypasses are there",
        {**FAST, "binarize.residual": "double"}, rectified(0.0),
    ),
    "teacher at first, no bypass, batch 8": Lever(
        "both", {**FAST, "binarize.residual": "double", "data.batch_size": 8}, both([rectified(0.0), no_bypass]),
    ),
    "residual double, no bypass": Lever(
        "adds stay; no layer has a bypass", {**FAST, "binarize.residual": "double"}, no_bypass,
    ),
    "gain learned from 1": Lever(
        "adds stay; a learned gain per channel on bypasses that starts at 1", {**FAST, "binarize.residual": "double"},
        bypass_gain(None, 1.0),
    ),
    "teacher at first, gain rises": Lever(
        "the same as learned from 0, but the gain rises from 0 to 1 in the first stage, and is gone then",
        {**FAST, "binarize.residual": "double"}, both([rectified(0.0), bypass_gain(SECOND)]),
    ),
    "EMA 0.95": Lever("decay 0.95 (default 0.98)", {**FAST, "ema.decay": 0.95}),
    "EMA 0.99": Lever("decay 0.99", {**FAST, "ema.decay": 0.99}),
    "no EMA": Lever("the last weights", {**FAST, "ema": None}),
    "latent decay 0.01": Lever("latent weights decay in the last stage too", {**FAST, "optimizer.latent_weight_decay": 0.01}),
    "latent x 3": Lever("latent weights learn three times as fast", {**FAST, "optimizer.lr_scale": dict.fromkeys(LATENT, 3.0)}),
    "latent x 0.3": Lever("and a third as fast", {**FAST, "optimizer.lr_scale": dict.fromkeys(LATENT, 0.3)}),
    "thresholds x 5": Lever("k, b and a learn five times as fast", {**FAST, "optimizer.lr_scale": {"*.binarizer.*": 5.0}}),
    "thresholds x 0.2": Lever("and a fifth as fast", {**FAST, "optimizer.lr_scale": {"*.binarizer.*": 0.2}}),
    "RPReLU x 5": Lever("slopes and shifts learn five times as fast", {**FAST, "optimizer.lr_scale": dict.fromkeys(RPRELU, 5.0)}),
    "beta2 0.99": Lever("AdamW's second beta", {**FAST, "optimizer.betas": [0.9, 0.99]}),
    "KL x 3": Lever("the teacher's weight", {**FAST, "stages.0.losses.kl.weight": 3.0, "stages.1.losses.kl.weight": 3.0}),
    "features": Lever(
        "attention maps of the decoder's blocks",
        {**FAST, "stages.0.losses.features": FEATURES, "stages.1.losses.features": FEATURES},
    ),
    "scale 0.5 to 2": Lever("larger scales (default 0.75 to 1.5)", {**FAST, "data.augment.scale": [0.5, 2.0]}),
    "no scale": Lever("neither zoom nor colours", {**FAST, "data.augment.scale": [1.0, 1.0], "data.augment.color_jitter": 0.0}),
    "CutMix": Lever("a rectangle of another sample in every second image", FAST, data=lambda data: Mixed(data, "cut")),
    "ClassMix": Lever("half the classes of another sample in every second image", FAST, data=lambda data: Mixed(data, "class")),
    "latent clip": Lever("after each step within 2 s_o", FAST, after_step=lambda student: Clipped(student, 2.0)),
    "signs frozen at the end": Lever("no sign flips in the last 30 %", FAST, after_step=lambda student: Frozen(student, 0.7)),
    "oscillations frozen": Lever(
        "weights whose sign flips in over 4 % of the last steps keep their more frequent one (Nagel et al., ICML 2022)", FAST,
        after_step=lambda student: Damped(student, 0.04),
    ),
    "no norms at the end": Lever("statistics are not taken again for the average", {**FAST, "calibrate.at_end": False}),
    "layers from the front": Lever("one stage; layers become binary one by one in the first half", ONE, in_order(0.5, False)),
    "layers from the back": Lever("in the reverse order", ONE, in_order(0.5, True)),
    "annealed tanh": Lever(
        "one stage; activations alpha tanh(t s / mean|s|), t from 1 to 100 in the first half, then signs",
        {**ONE, "binarize.method": "bidense-annealed"},
    ),
    "weights of ReCU": Lever("standardised, clamped to a quantile, learned scale", {**FAST, "binarize.method": "bidense-recu"}),
    "DPReLU": Lever("PokeBNN's: two slopes, shifts", {**FAST, "binarize.method": "bidense-dprelu"}),
}  # fmt: skip
