"""Last pass: what a user should know of binary layers that train or pack in another way than the others."""

from __future__ import annotations

from torch import nn

from bidensify.rewrite.plan.draft import Draft
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.plan.fusing import fusing
from bidensify.rewrite.weights import zero_channels

__all__ = ["note_layers"]


def note_layers(draft: Draft) -> Draft:
    """Adds notes on frozen weights, padding that packed layers do not have, weights without signs, lone values, fusing."""
    modules = draft.flow.record.modules
    draft.note_on(
        [layer for layer in draft.binary_layers if _is_frozen(modules[layer.path])],
        "its weight is frozen (requires_grad=False) and stays so; what the rewrite adds to it is trained",
    )
    modes = {layer.path: getattr(modules[layer.path], "padding_mode", "zeros") for layer in draft.binary_layers}
    for mode in sorted(set(modes.values()) - {"zeros"}):
        draft.note_on(
            [layer for layer in draft.binary_layers if modes[layer.path] == mode],
            f"pads with padding_mode={mode!r}, which can be trained but not packed; keep it by a rule, or pad with zeros",
        )
    draft.note_on(
        [layer for layer in draft.binary_layers if zero_channels(modules[layer.path]) is not None],
        "has output channels that zeros alone feed, which have no sign and would never learn: their weights are drawn",
    )
    draft.note_on(
        [layer for layer in draft.binary_layers if layer.norm is None and _gives_one_value(draft, layer)],
        "gives one value per channel and image at this size, and its new BatchNorm needs two to train: give it batches of at "
        "least two images, or larger ones",
    )
    for path, name in fusing(modules, draft.binary_layers):
        draft.note(f"{path or 'the network'}: {name}() can be called before the rewrite alone")
        break
    return draft


def _gives_one_value(draft: Draft, layer: LayerPlan) -> bool:
    calls = draft.flow.calls[layer.path]
    return any(draft.flow.shape(node) is not None and draft.flow.positions(node) == 1 for node in calls)


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for name, parameter in module.named_parameters() if name != "bias")
