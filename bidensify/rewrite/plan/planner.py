"""From a record and a configuration to a plan: norms, residual adds, activations, blocks.

The rule behind all of it: a full-precision signal reaches every point exactly once, never lost, never doubled.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from torch import fx, nn

from bidensify._util.fingerprint import fingerprint
from bidensify.config import BidensifyConfig
from bidensify.errors import PlanError
from bidensify.methods import get_method, in_frame
from bidensify.rewrite.blocks.edit import BlockEdit
from bidensify.rewrite.blocks.proof import Traced, editable_event, operation_of, trace_block
from bidensify.rewrite.plan.activations import note_nonnegative, plan_activations
from bidensify.rewrite.plan.entries import ActivationPlan, BlockPlan, LayerPlan, NewActivation
from bidensify.rewrite.plan.flow import Flow
from bidensify.rewrite.plan.kinds import fused_activation, is_absorbable_norm, is_frozen_norm, is_relu_like
from bidensify.rewrite.plan.layers import plan_layers
from bidensify.rewrite.plan.residual import Residual, find_residuals
from bidensify.rewrite.plan.schema import Plan
from bidensify.rewrite.plan.streams import drop_doubled
from bidensify.rewrite.record.recorded import Record, scope_of
from bidensify.rewrite.record.untouched import forget_unreal

__all__ = ["Planner", "make_plan"]


class Planner:
    """Takes the decisions in order: layers, norms, residual adds, activations; then writes the plan."""

    def __init__(self, record: Record, model: nn.Module, config: BidensifyConfig) -> None:
        self.record = record
        self.model = model
        self.config = config
        self.method = in_frame(config.method, config)
        # What a method's authors do with residual adds holds where the user says nothing of them.
        usual = get_method(self.method).residual
        self.residual = usual if usual is not None and config.residual == "auto" else config.residual
        self.flow = Flow(record)
        self.nodes = record.module_nodes()
        layers, self.rule_matches = plan_layers(self.flow, config)
        self.order = [layer.path for layer in layers]
        self.functional = [layer for layer in layers if layer.kind == "function"]
        self.layers = {layer.path: layer for layer in layers if layer.kind != "function"}
        self.activations: dict[str, ActivationPlan] = {}
        self.edits: dict[str, dict[int, BlockEdit]] = defaultdict(dict)
        self.modules: dict[str, dict[str, NewActivation]] = defaultdict(dict)
        self.edit_notes: dict[str, list[str]] = defaultdict(list)
        self.notes: list[str] = []
        self.traced: dict[str, Traced | str] = {}
        self.names = {id(module): path for path, module in record.modules.items()}
        # Adds that the rewrite removes: node -> the operand that stays.
        self.removed: dict[fx.Node, fx.Node] = {}
        self.absorbed_scales: set[fx.Node] = set()
        self.absorbed_activations: set[str] = set()

    # helpers

    def binary(self, node: fx.Node | None) -> LayerPlan | None:
        """The plan of the binary layer that a node calls, or None."""
        if node is None or node.op != "call_module":
            return None
        layer = self.layers.get(str(node.target))
        return layer if layer is not None and layer.action == "binary" else None

    def is_absorbed_norm(self, node: fx.Node) -> bool:
        """Whether a node is a BatchNorm that a binary layer takes over."""
        source = self.flow.data_input(node)
        layer = self.binary(source)
        return layer is not None and node.op == "call_module" and layer.norm == node.target

    def trace(self, path: str) -> Traced | str:
        """The proven trace of a block, or why it has none; traced once."""
        if path not in self.traced:
            inside = f"{path}." if path else ""
            names_set = {
                (owner[len(inside) :], name)
                for owner, name in self.record.attributes_set
                if owner == path or owner.startswith(inside)
            }
            self.traced[path] = trace_block(self.record.modules[path], self.record.calls[path], self.names, names_set)
        return self.traced[path]

    def site(self, node: fx.Node, *, note: bool = True) -> tuple[str, int] | None:
        """(block path, event) of a node, if its block's code can be edited there in every call alike."""
        scope = scope_of(node)
        if not scope or "event" not in node.meta:
            return None
        path, event = scope[-1][0], int(node.meta["event"])
        traced = self.trace(path)
        if isinstance(traced, str):
            if note:
                self.note(f"{path or 'the network'}: its code is left as it is, since {traced}")
            return None
        return (path, event) if editable_event(traced, event) else None

    def note(self, text: str) -> None:
        """Adds a note to the plan, once."""
        if text not in self.notes:
            self.notes.append(text)

    def siblings(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of the same step in every recorded call of the same block."""
        path, event = scope_of(node)[-1][0], int(node.meta["event"])
        found = [call.events[event].node for call in self.record.calls[path] if event < len(call.events)]
        return [each for each in found if each is not None]

    def edit(self, path: str, event: int, action: str, *, argument: int = 0, module: str = "") -> None:
        """Notes one change of a block's code; see ``BlockEdit``."""
        traced = self.trace(path)
        assert isinstance(traced, Traced)
        node = traced.events[event]
        assert node is not None
        self.edits[path][event] = BlockEdit(node.name, operation_of(node), action, argument, module)

    def note_frozen(self) -> None:
        """Says which binary layers have latent weights that no training would change."""
        frozen = [
            path
            for path, layer in self.layers.items()
            if layer.action == "binary"
            and not any(
                parameter.requires_grad
                for name, parameter in self.record.modules[path].named_parameters()
                if name != "bias"
            )
        ]
        if frozen:
            more = f" (and those of {len(frozen) - 1} more binary layers)" if len(frozen) > 1 else ""
            self.note(
                f"{frozen[0]}: its weight is frozen (requires_grad=False){more} and stays so; what the rewrite adds to it "
                "is trained"
            )

    def note_padding(self) -> None:
        """Says which binary layers pad in a way that packed layers do not."""
        modes = {
            path: mode
            for path, layer in self.layers.items()
            if layer.action == "binary"
            and (mode := getattr(self.record.modules[path], "padding_mode", "zeros")) != "zeros"
        }
        if modes:
            path, mode = next(iter(modes.items()))
            more = f" (and {len(modes) - 1} more binary layers in such a way)" if len(modes) > 1 else ""
            self.note(
                f"{path}: pads with padding_mode={mode!r}{more}, which can be trained but not packed; keep it by a rule, or "
                "pad with zeros"
            )

    # steps

    def plan_norms(self) -> None:
        """A BatchNorm directly behind a binary convolution, and behind nothing else, becomes the layer's own."""
        for path, layer in list(self.layers.items()):
            if layer.action != "binary" or layer.kind == "linear":
                continue
            users = [self.flow.only_user(node) for node in self.nodes[path]]
            targets = {str(user.target) if user is not None and user.op == "call_module" else "" for user in users}
            if len(targets) != 1:
                continue
            target = targets.pop()
            norm = self.record.modules.get(target) if target else None
            if (
                norm is None
                or len(self.nodes[target]) != len(users)
                or not is_absorbable_norm(norm, layer.out_channels)
            ):
                continue
            reason = layer.reason
            if is_frozen_norm(norm):
                reason += f"; absorbs {type(norm).__name__}, whose statistics must follow the binary layer"
            self.layers[path] = replace(layer, norm=target, reason=reason)
            inner = fused_activation(norm)
            if inner is not None:
                replaced = is_relu_like(type(inner).__name__) and layer.activation
                action = "absorbed" if replaced else "norm"
                self.activations[target] = ActivationPlan(target, action, layer.out_channels, 1, layer.method)
                self.layers[path] = replace(self.layers[path], activation=replaced)
            else:
                self.activations[target] = ActivationPlan(target, "absorbed", layer.out_channels)

    def plan_residuals(self) -> None:
        """Each residual add is removed, or stays and the last layer of its chain drops its bypass."""
        if self.residual == "double":
            return
        for found in find_residuals(self):
            layer = self.layers[found.last]
            if not layer.bypass:
                continue
            if self.residual == "auto" and found.removable and self._remove(found):
                continue
            self.layers[found.last] = replace(
                layer, bypass=False, reason=f"{layer.reason}; the residual add carries the full-precision signal"
            )

    def _remove(self, found: Residual) -> bool:
        steps = [(found.add, found.main)] + [(node, None) for node in found.scales]
        sites = []
        for node, _ in steps:
            site = ("", -1) if node.op == "call_module" and len(self.nodes[str(node.target)]) == 1 else self.site(node)
            if site is None:
                return False
            sites.append(site)
        alike = self.siblings(found.add)
        if not all(self.flow.is_add(other) for other in alike):
            return False
        layer = self.layers[found.last]
        for (node, kept), (path, event) in zip(steps, sites):
            if event < 0:
                self.activations[str(node.target)] = ActivationPlan(str(node.target), "absorbed")
                continue
            tensors = self.flow.tensors(node)
            main = kept if kept is not None else self.flow.data_input(node)
            assert main is not None
            self.edit(path, event, "forward", argument=tensors.index(main))
            self.edit_notes[path].append(
                f"the residual add around {found.last} is removed: the bypasses carry it"
                if kept is not None
                else f"the layer scale behind {found.last} moves into its BatchNorm"
            )
        for node in alike:
            self.removed[node] = self.flow.tensors(node)[self.flow.tensors(found.add).index(found.main)]
        scale = None
        if found.scales:
            self.absorbed_scales.update(found.scales)
            scale = self.flow.layer_scale(found.scales[0])
        self.layers[found.last] = replace(
            layer, way="block", layer_scale=scale, reason=f"{layer.reason}; replaces the residual add"
        )
        return True

    def build(self) -> Plan:
        """Takes all decisions and writes the plan.

        Raises:
            PlanError: no layer would become binary.
        """
        self.plan_norms()
        self.plan_residuals()
        drop_doubled(self)
        fused = {path for path, layer in self.layers.items() if layer.norm and self._fused(layer.norm)}
        plan_activations(self)
        note_nonnegative(self)
        for path, layer in self.layers.items():
            owns = layer.activation and (path in self.absorbed_activations or path in fused)
            self.layers[path] = replace(layer, activation=owns)
        if not any(layer.action == "binary" for layer in self.layers.values()):
            reasons = sorted({layer.reason for layer in self.layers.values()})
            raise PlanError(
                "the rewrite would change nothing: every layer stays in full precision "
                f"({'; '.join(reasons)}). Add a rule with action 'binarize', or change keep_first / keep_last"
            )
        self.note_frozen()
        self.note_padding()
        blocks = []
        for path, edits in self.edits.items():
            traced = self.trace(path)
            assert isinstance(traced, Traced)
            blocks.append(
                BlockPlan(
                    path,
                    tuple(edits[event] for event in sorted(edits)),
                    traced.arguments.varying,
                    traced.arguments.fixed,
                    traced.attributes,
                    dict(self.modules.get(path, {})),
                    tuple(self.edit_notes[path]),
                )
            )
        return Plan(
            model_class=type(self.model).__name__,
            config=self.config,
            layers=[self.layers[path] for path in self.order if path in self.layers] + self.functional,
            activations=list(self.activations.values()),
            blocks=blocks,
            notes=self.notes,
            rule_matches=self.rule_matches,
            inputs=self.record.inputs_text,
            fingerprint=fingerprint(self.model),
        )

    def _fused(self, norm: str) -> bool:
        inner = fused_activation(self.record.modules[norm])
        return inner is not None and is_relu_like(type(inner).__name__)


def make_plan(record: Record, model: nn.Module, config: BidensifyConfig) -> Plan:
    """The plan for ``model``, as recorded, under ``config``."""
    planner = Planner(record, model, config)
    try:
        return planner.build()
    finally:
        if planner.traced:
            forget_unreal()
