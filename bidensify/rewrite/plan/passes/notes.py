"""Last pass: what a user should know of binary layers that train or pack in another way than the others."""

from __future__ import annotations

from torch import nn

from bidensify.rewrite.plan.draft import Draft

__all__ = ["note_layers"]


def note_layers(draft: Draft) -> Draft:
    """Adds notes on layers whose weights are frozen and on layers that pad in a way that packed layers do not."""
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
    return draft


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for name, parameter in module.named_parameters() if name != "bias")
