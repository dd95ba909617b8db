"""First pass: which BatchNorms the binary layers absorb."""

from __future__ import annotations

from bidensify.rewrite.kinds import (
    fused_activation,
    is_absorbable_norm,
    is_activation,
    is_frozen_norm,
    is_norm,
    more_than_norm,
)
from bidensify.rewrite.plan.draft import Draft
from bidensify.rewrite.plan.entries import ActivationPlan, LayerPlan, slope_fields

__all__ = ["absorb_norms"]


def absorb_norms(draft: Draft) -> Draft:
    """A BatchNorm directly behind a binary convolution, and behind nothing else, becomes the layer's own.

    Sets ``norm`` and ``activation`` of layers; adds the norms' places to ``activations``.
    """
    for layer in draft.binary_layers:
        target = _norm_behind(draft, layer) if layer.kind != "linear" else None
        if target is None:
            continue
        norm = draft.flow.record.modules[target]
        because = ""
        if is_frozen_norm(norm):
            because = f"absorbs {type(norm).__name__}, whose statistics must follow the binary layer"
        draft.change(layer.path, because, norm=target)
        inner = fused_activation(norm)
        if inner is None:
            draft.activations[target] = ActivationPlan(target, "absorbed", layer.out_channels)
            continue
        replaced = is_activation(inner) and layer.activation
        action = "absorbed" if replaced else "norm"
        draft.activations[target] = ActivationPlan(target, action, layer.out_channels, 1, layer.method)
        draft.change(layer.path, activation=replaced)
        if replaced:
            draft.change(layer.path, **slope_fields(inner, f"{target}.act"))
            draft.absorbed_activations.add(layer.path)
    return draft


def _norm_behind(draft: Draft, layer: LayerPlan) -> str | None:
    """The path of the norm that stands behind every call of the layer, and behind nothing else."""
    flow = draft.flow
    users = [flow.only_user(node) for node in flow.calls[layer.path]]
    targets = {str(user.target) if user is not None and user.op == "call_module" else "" for user in users}
    target = targets.pop() if len(targets) == 1 else ""
    norm = flow.record.modules.get(target) if target else None
    if norm is None or len(flow.calls[target]) != len(users):
        return None
    if flow.record.used_apart(target, layer.path):
        draft.note(f"{target}: stays behind {layer.path} and its new BatchNorm, since training calls it elsewhere too")
        return None
    more = more_than_norm(norm) if is_norm(norm) else ""
    if more:
        draft.note(f"{target}: stays behind {layer.path} and its new BatchNorm, since {more}")
    if not is_absorbable_norm(norm, layer.out_channels):
        return None
    return target
