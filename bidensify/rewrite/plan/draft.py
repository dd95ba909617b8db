"""What is decided of a plan so far: the passes hand it on, each reads what those before it decided and adds its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from bidensify.config import BidensifyConfig
from bidensify.methods import get_method, in_frame
from bidensify.rewrite.plan.code import CodeChanges, Site
from bidensify.rewrite.plan.entries import ActivationPlan, LayerPlan
from bidensify.rewrite.plan.flow import Flow

__all__ = ["Draft"]


@dataclass
class Draft:
    """A plan in the making.

    Attributes:
        flow: the record, with questions answered about it; given.
        config: given.
        layers: path -> layer. Which of them are binary is given; passes change their norm, bypass, activation and reason.
        code: changes of blocks' own code (residual adds, activations).
        activations: path -> module whose role changes at its path (norms, layer scales, activations).
        removed: residual adds that go -> the operand that stays.
        absorbed_scales: layer scales that move into a BatchNorm.
        absorbed_activations: layers whose activation moves into them.
        factors: activations that stay since others are multiplied with what they give.
        notes: what could not be done, and why.
    """

    flow: Flow
    config: BidensifyConfig
    layers: dict[str, LayerPlan]
    code: CodeChanges
    activations: dict[str, ActivationPlan] = field(default_factory=dict)
    removed: dict[fx.Node, fx.Node] = field(default_factory=dict)
    absorbed_scales: set[fx.Node] = field(default_factory=set)
    absorbed_activations: set[str] = field(default_factory=set)
    factors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The method of what no rule gives another one."""
        return in_frame(self.config.method, self.config)

    @property
    def residual(self) -> str:
        """What becomes of residual adds; what a method's authors do with them holds where the user says nothing."""
        usual = get_method(self.method).residual
        return usual if usual is not None and self.config.residual == "auto" else self.config.residual

    @property
    def binary_layers(self) -> list[LayerPlan]:
        """The layers that become binary."""
        return [layer for layer in self.layers.values() if layer.action == "binary"]

    def binary(self, node: fx.Node | None) -> LayerPlan | None:
        """The binary layer that a node calls, or None."""
        if node is None or node.op != "call_module":
            return None
        layer = self.layers.get(str(node.target))
        return layer if layer is not None and layer.action == "binary" else None

    def change(self, path: str, because: str = "", **fields: Any) -> None:
        """Changes what is decided of a layer; ``because`` is added to its reason."""
        layer = self.layers[path]
        self.layers[path] = replace(layer, reason=f"{layer.reason}; {because}" if because else layer.reason, **fields)

    def is_absorbed_norm(self, node: fx.Node) -> bool:
        """Whether a node is a BatchNorm that a binary layer takes over."""
        layer = self.binary(self.flow.data_input(node))
        return layer is not None and node.op == "call_module" and layer.norm == node.target

    def site(self, node: fx.Node, *, note: bool = True) -> Site | None:
        """Where a node's step can be changed, or None; why not is noted."""
        site = self.code.site(node)
        if isinstance(site, str):
            if note:
                self.note(site)
            return None
        return site

    def note(self, text: str) -> None:
        """Adds a note to the plan, once."""
        if text not in self.notes:
            self.notes.append(text)

    def note_on(self, layers: Iterable[LayerPlan], text: str) -> None:
        """Adds a note on several layers, of which it names the first."""
        paths = [layer.path for layer in layers]
        if paths:
            more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
            self.note(f"{paths[0]}{more}: {text}")
