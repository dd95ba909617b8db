"""From a model and a configuration to a binarized model: record, plan, apply in place, check."""

from __future__ import annotations

from bidensify.rewrite.api import bidensify, plan
from bidensify.rewrite.apply.model import apply_plan
from bidensify.rewrite.kinds import register_kind
from bidensify.rewrite.plan.entries import ActivationPlan, BlockPlan, LayerPlan
from bidensify.rewrite.plan.schema import Plan
from bidensify.rewrite.record.recorded import Record
from bidensify.rewrite.record.recorder import record

__all__ = [
    "ActivationPlan",
    "BlockPlan",
    "LayerPlan",
    "Plan",
    "Record",
    "apply_plan",
    "bidensify",
    "plan",
    "record",
    "register_kind",
]
