"""From a record and a configuration to a plan: the passes in their order.

The rule behind all of them: a full-precision signal reaches every point exactly once, never lost, never doubled.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bidensify._util.fingerprint import fingerprint
from bidensify.config import BidensifyConfig
from bidensify.errors import PlanError
from bidensify.rewrite.plan.code import CodeChanges
from bidensify.rewrite.plan.draft import Draft
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.plan.flow import Flow
from bidensify.rewrite.plan.layers import plan_layers
from bidensify.rewrite.plan.passes.activations import place_activations
from bidensify.rewrite.plan.passes.adds import settle_adds
from bidensify.rewrite.plan.passes.nonnegative import mark_nonnegative
from bidensify.rewrite.plan.passes.norms import absorb_norms
from bidensify.rewrite.plan.passes.notes import note_layers
from bidensify.rewrite.plan.passes.streams import drop_doubled
from bidensify.rewrite.plan.schema import Plan
from bidensify.rewrite.record.recorded import Record
from bidensify.rewrite.record.restore import clear_fake_caches

__all__ = ["make_plan"]

_PASSES = (absorb_norms, settle_adds, drop_doubled, place_activations, mark_nonnegative, note_layers)


def make_plan(record: Record, model: nn.Module, config: BidensifyConfig) -> Plan:
    """The plan for ``model``, as recorded, under ``config``.

    Raises:
        PlanError: no layer would become binary, or a file could not hold the plan.
        ConfigError: an unknown method, or a rule that matches no layer.
    """
    flow = Flow(record)
    layers, rule_matches = plan_layers(flow, config)
    if not any(layer.action == "binary" for layer in layers):
        raise PlanError(_nothing(layers))
    called = {layer.path: layer for layer in layers if layer.kind != "function"}
    draft = Draft(flow, config, called, CodeChanges(record))
    try:
        for step in _PASSES:
            draft = step(draft)
        blocks = draft.code.entries()
    finally:
        if draft.code.any_traced:
            clear_fake_caches()
    made = Plan(
        model_class=type(model).__name__,
        config=config,
        layers=[*draft.layers.values(), *(layer for layer in layers if layer.kind == "function")],
        activations=list(draft.activations.values()),
        blocks=blocks,
        notes=draft.notes,
        rule_matches=rule_matches,
        inputs=record.inputs_text,
        fingerprint=fingerprint(model),
    )
    try:
        # Now, and not when a trained network is loaded again.
        Plan.from_dict(made.to_dict())
    except PlanError as error:
        said = str(error).removesuffix("; plan again")
        raise PlanError(f"{said}. No file could hold the plan of this network: rename what it names") from error
    return made


def _nothing(layers: Sequence[LayerPlan]) -> str:
    """Why a rewrite would change nothing, and what could be done."""
    reasons = sorted({layer.reason for layer in layers})
    advice = ["add a rule with action 'binarize'"]
    for reason, option in (("first layer on the image", "keep_first"), ("prediction layer", "keep_last")):
        if reason in reasons:
            advice.append(f"set {option}=False")
    if any(reason.startswith("linear layer on tokens") for reason in reasons):
        advice.append("set linear='all'")
    if all(reason.endswith("is out of reach") for reason in reasons):
        advice = ["it is Conv2d, ConvTranspose2d and Linear layers that can become binary"]
    return f"the rewrite would change nothing: every layer stays in full precision ({'; '.join(reasons)}); {', or '.join(advice)}"
