"""From a model and a configuration to a binarized model: record, plan, apply in place, check."""

from __future__ import annotations

from bidensify.rewrite.api import bidensify, plan
from bidensify.rewrite.apply import apply_plan
from bidensify.rewrite.plan import ActivationPlan, BlockPlan, LayerPlan, Plan
from bidensify.rewrite.record import record
from bidensify.rewrite.recorded import Record
from bidensify.rewrite.summary import Summary, summary

__all__ = [
    "ActivationPlan",
    "BlockPlan",
    "LayerPlan",
    "Plan",
    "Record",
    "Summary",
    "apply_plan",
    "bidensify",
    "plan",
    "record",
    "summary",
]
