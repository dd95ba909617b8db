"""Second pass: each residual add is removed, or stays and the last layer of its chain drops its bypass."""

from __future__ import annotations

from bidensify.rewrite.plan.code import Site
from bidensify.rewrite.plan.draft import Draft
from bidensify.rewrite.plan.entries import REPLACES_ADD, ActivationPlan
from bidensify.rewrite.plan.passes.residual import Residual, find_residuals

__all__ = ["settle_adds"]


def settle_adds(draft: Draft) -> Draft:
    """Settles every residual add whose chain ends in a binary layer, in the order of the run.

    Reads which norms are absorbed; sets ``bypass``, ``layer_scale`` and ``way`` of layers, ``removed`` and ``absorbed_scales``,
    and changes code.
    """
    if draft.residual == "double":
        return draft
    for found in find_residuals(draft):
        if not draft.layers[found.last].bypass:
            continue
        if not (draft.residual == "auto" and found.removable and _remove(draft, found)):
            draft.change(found.last, "the residual add carries the full-precision signal", bypass=False)
    return draft


def _remove(draft: Draft, found: Residual) -> bool:
    """Takes the add and the layer scale before it out of the code, if that can be done in every call alike."""
    flow = draft.flow
    # A LayerScale module behind this layer alone becomes an identity at its path.
    modules = [
        node
        for node in found.scales
        if node.op == "call_module"
        and len(flow.calls[str(node.target)]) == 1
        and not flow.record.used_apart(str(node.target), found.last)
    ]
    steps = [found.add, *(node for node in found.scales if node not in modules)]
    sites: list[Site] = []
    for node in steps:
        site = draft.site(node)
        if site is None:
            return False
        sites.append(site)
    alike = flow.siblings(found.add)
    if not all(flow.is_add(other) for other in alike):
        return False
    main = flow.tensors(found.add).index(found.main)
    for node, site in zip(steps, sites):
        if node is found.add:
            note = f"the residual add around {found.last} is removed: the bypasses carry it"
            draft.code.hand_through(site, main, note)
        else:
            data = flow.data_input(node)
            assert data is not None
            note = f"the layer scale behind {found.last} moves into its BatchNorm"
            draft.code.hand_through(site, flow.tensors(node).index(data), note)
    for node in modules:
        draft.activations[str(node.target)] = ActivationPlan(str(node.target), "absorbed")
    for node in alike:
        draft.removed[node] = flow.tensors(node)[main]
    draft.absorbed_scales.update(found.scales)
    scale = flow.layer_scale(found.scales[0]) if found.scales else None
    draft.change(found.last, REPLACES_ADD, way="block", layer_scale=scale)
    return True
