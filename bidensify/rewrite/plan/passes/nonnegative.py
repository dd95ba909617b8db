"""Fifth pass: which binary layers read a ReLU that stays as it is."""

from __future__ import annotations

from torch import fx

from bidensify.rewrite.plan.code import place_of
from bidensify.rewrite.plan.draft import Draft

__all__ = ["mark_nonnegative"]


def mark_nonnegative(draft: Draft) -> Draft:
    """Marks the layers whose every input comes from a ReLU that stays, at most pooled or moved on the way.

    Reads which activations are exchanged; sets ``nonnegative`` of layers.
    """
    for layer in draft.binary_layers:
        calls = draft.flow.calls[layer.path]
        draft.change(layer.path, nonnegative=all(_stays_nonnegative(draft, node) for node in calls))
    return draft


def _stays_nonnegative(draft: Draft, node: fx.Node) -> bool:
    flow = draft.flow
    current = flow.data_input(node)
    while current is not None:
        if flow.is_activation(current):
            replaced = str(current.target) in draft.activations or place_of(current) in draft.code
            return flow.name(current).lower() in ("relu", "relu6") and not replaced
        if not (flow.is_pass(current) or flow.is_reorder(current) or flow.name(current) == "MaxPool2d"):
            return False
        current = flow.data_input(current)
    return False
