"""From a record and a configuration to a plan: norms, residual adds, activations, blocks.

The rule behind all of it: a full-precision signal reaches every point exactly once, never lost, never doubled.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from torch import fx, nn

from bidensify._fingerprint import fingerprint
from bidensify.config import BidensifyConfig
from bidensify.errors import PlanError
from bidensify.methods import get_method
from bidensify.rewrite.blocks import BlockEdit, Traced, editable_event, operation_of, trace_block
from bidensify.rewrite.flow import Flow, is_relu_like
from bidensify.rewrite.layers import plan_layers
from bidensify.rewrite.plan import ActivationPlan, BlockPlan, LayerPlan, Plan
from bidensify.rewrite.record import Record, scope_of
from bidensify.rewrite.residual import Residual, find_residuals

__all__ = ["Planner", "make_plan"]


class Planner:
    """Takes the decisions in order: layers, norms, residual adds, activations; then writes the plan."""

    def __init__(self, record: Record, model: nn.Module, config: BidensifyConfig) -> None:
        self.record = record
        self.model = model
        self.config = config
        self.flow = Flow(record)
        self.nodes = record.module_nodes()
        layers, self.rule_matches = plan_layers(self.flow, config)
        self.order = [layer.path for layer in layers]
        self.functional = [layer for layer in layers if layer.kind == "function"]
        self.layers = {layer.path: layer for layer in layers if layer.kind != "function"}
        self.activations: dict[str, ActivationPlan] = {}
        self.edits: dict[str, dict[int, BlockEdit]] = defaultdict(dict)
        self.modules: dict[str, dict[str, tuple[int, int, str]]] = defaultdict(dict)
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
            self.traced[path] = trace_block(self.record.modules[path], self.record.calls[path], self.names)
        return self.traced[path]

    def site(self, node: fx.Node) -> tuple[str, int] | None:
        """(block path, event) of a node, if its block's code can be edited there in every call alike."""
        scope = scope_of(node)
        if not scope or "event" not in node.meta:
            return None
        path, event = scope[-1][0], int(node.meta["event"])
        traced = self.trace(path)
        if isinstance(traced, str):
            self._note(f"{path or 'the network'}: its code is left as it is, since {traced}")
            return None
        return (path, event) if editable_event(traced, event) else None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def siblings(self, node: fx.Node) -> list[fx.Node]:
        """The nodes of the same step in every recorded call of the same block."""
        path, event = scope_of(node)[-1][0], int(node.meta["event"])
        found = [call.events[event].node for call in self.record.calls[path] if event < len(call.events)]
        return [each for each in found if each is not None]

    def _edit(self, path: str, event: int, action: str, *, argument: int = 0, module: str = "") -> None:
        traced = self.trace(path)
        assert isinstance(traced, Traced)
        node = traced.events[event]
        self.edits[path][event] = BlockEdit(node.name, operation_of(node), action, argument, module)

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
            if not isinstance(norm, nn.BatchNorm2d) or norm.num_features != layer.out_channels:
                continue
            if norm.running_mean is None or len(self.nodes[target]) != len(users):
                continue
            self.layers[path] = replace(layer, norm=target)
            inner = getattr(norm, "act", None)
            if isinstance(inner, nn.Module) and not isinstance(inner, nn.Identity):
                replaced = is_relu_like(type(inner).__name__) and layer.activation
                action = "absorbed" if replaced else "norm"
                self.activations[target] = ActivationPlan(target, action, layer.out_channels, 1, layer.method)
                self.layers[path] = replace(self.layers[path], activation=replaced)
            else:
                self.activations[target] = ActivationPlan(target, "absorbed", layer.out_channels)

    def plan_residuals(self) -> None:
        """Each residual add is removed, or stays and the last layer of its chain drops its bypass."""
        if self.config.residual == "double":
            return
        for found in find_residuals(self):
            layer = self.layers[found.last]
            if not layer.bypass:
                continue
            if self.config.residual == "auto" and found.removable and self._remove(found):
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
            self._edit(path, event, "forward", argument=tensors.index(main))
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

    def plan_activations(self) -> None:
        """ReLU-like activations beside binary layers: into the layer where they follow it, else at their own place."""
        sites: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.record.graph.nodes:
            if self.flow.is_activation(node):
                sites[str(node.target) if node.op == "call_module" else f"\0{id(node)}"].append(node)
        for key, nodes in sites.items():
            shared = key.startswith("\0") or len(nodes) > 1
            behind = [self._layer_before(node) for node in nodes]
            first = behind[0]
            alone = not key.startswith("\0") and all(each == first for each in behind)
            if first is not None and alone and len(nodes) == len(self.nodes[first]) and self.layers[first].activation:
                # One module behind one layer: its work moves into the layer.
                self.absorbed_activations.add(first)
                self.activations[key] = ActivationPlan(key, "absorbed")
                continue
            for node, layer_path in zip(nodes, behind):
                self._plan_site(node, layer_path, key, shared)

    def _plan_site(self, node: fx.Node, layer_path: str | None, key: str, shared: bool) -> None:
        channels, dim, method = self._activation_of(node, layer_path)
        if not channels:
            return
        if not shared:
            self.activations[key] = ActivationPlan(key, "replace", channels, dim, method)
            return
        site = self.site(node)
        if site is None:
            where = scope_of(node)[-1][0] if scope_of(node) else ""
            self._note(
                f"{where or 'the network'}: the activation {self.flow.name(node)} is shared or functional and stays as "
                "it is, since the code around it could not be edited"
            )
            return
        path, event = site
        if event in self.edits[path]:
            return
        if layer_path is not None and self.layers[layer_path].activation and self._folds(node, layer_path):
            self.absorbed_activations.add(layer_path)
            self._edit(path, event, "forward")
            self.edit_notes[path].append(f"the activation behind {layer_path} moves into it")
            self.layers[layer_path] = replace(self.layers[layer_path], way="block")
            return
        name = f"activation_{event}"
        self.modules[path][name] = (channels, dim, method)
        self._edit(path, event, "module", module=name)
        self.edit_notes[path].append(f"the activation at step {event} becomes {name}")

    def _folds(self, node: fx.Node, layer_path: str) -> bool:
        """Whether every call of the layer is followed by this very step of the block."""
        return {self._layer_before(other) for other in self.siblings(node)} == {layer_path} and len(
            self.siblings(node)
        ) == len(self.nodes[layer_path])

    def _layer_before(self, node: fx.Node) -> str | None:
        """The binary layer whose output goes to this activation and nowhere else."""
        current = self.flow.data_input(node)
        child = node
        while current is not None and self.flow.only_user(current) is child:
            layer = self.binary(current)
            if layer is not None:
                return layer.path
            if current in self.removed:
                child, current = current, self.removed[current]
            elif self.is_absorbed_norm(current) or isinstance(self.flow.module(current), nn.Identity):
                norm = self.record.modules.get(str(current.target))
                inner = getattr(norm, "act", None)
                if isinstance(inner, nn.Module) and not isinstance(inner, nn.Identity):
                    return None
                child, current = current, self.flow.data_input(current)
            elif current in self.absorbed_scales:
                child, current = current, self.flow.data_input(current)
            else:
                return None
        return None

    def _activation_of(self, node: fx.Node, layer_path: str | None) -> tuple[int, int, str]:
        """(channels, dim, method) of what replaces an activation; channels 0: it is beside no binary layer."""
        if self.config.activation == "keep":
            return 0, 1, ""
        method = self.config.method
        if layer_path is not None:
            if not self.layers[layer_path].activation:
                return 0, 1, ""
            method = self.layers[layer_path].method
        elif not self._beside_binary(node):
            return 0, 1, ""
        if get_method(method).activation is None:
            return 0, 1, ""
        shape = self.flow.shape(node)
        if shape is None or len(shape) < 3:
            return 0, 1, ""
        last = self.flow.channels_last(node)
        return (shape[-1] if last else shape[1]), (-1 if last else 1), method

    def _beside_binary(self, node: fx.Node) -> bool:
        def is_binary(item: fx.Node) -> bool:
            return self.binary(item) is not None

        ahead = self.flow.forward_until(node, is_binary, lambda n: not self.flow.is_layer(n) and n.op != "output")
        if any(True for _ in ahead):
            return True
        stack, seen = list(self.flow.tensors(node)), set()
        while stack:
            item = stack.pop()
            if item in seen:
                continue
            seen.add(item)
            if is_binary(item):
                return True
            if not self.flow.is_layer(item):
                stack.extend(self.flow.tensors(item))
        return False

    def build(self) -> Plan:
        """Takes all decisions and writes the plan.

        Raises:
            PlanError: no layer would become binary.
        """
        self.plan_norms()
        self.plan_residuals()
        fused = {path for path, layer in self.layers.items() if layer.norm and self._fused(layer.norm)}
        self.plan_activations()
        for path, layer in self.layers.items():
            owns = layer.activation and (path in self.absorbed_activations or path in fused)
            self.layers[path] = replace(layer, activation=owns)
        if not any(layer.action == "binary" for layer in self.layers.values()):
            reasons = sorted({layer.reason for layer in self.layers.values()})
            raise PlanError(
                "the rewrite would change nothing: every layer stays in full precision "
                f"({'; '.join(reasons)}). Add a rule with action 'binarize', or change keep_first / keep_last"
            )
        blocks = []
        for path, edits in self.edits.items():
            traced = self.trace(path)
            assert isinstance(traced, Traced)
            blocks.append(
                BlockPlan(
                    path,
                    tuple(edits[event] for event in sorted(edits)),
                    tuple(traced.varying),
                    dict(traced.constants),
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
        inner = getattr(self.record.modules[norm], "act", None)
        return isinstance(inner, nn.Module) and is_relu_like(type(inner).__name__)


def make_plan(record: Record, model: nn.Module, config: BidensifyConfig) -> Plan:
    """The plan for ``model``, as recorded, under ``config``."""
    return Planner(record, model, config).build()
