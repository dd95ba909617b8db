"""Which parameters the network computes with by itself, outside the call of the module that holds them."""

from __future__ import annotations

from torch import fx, nn

from bidensify.rewrite.plan.flow import Flow

__all__ = ["Outside"]

# Of a second argument these read the shape, the dtype or the device alone.
_LIKE_ANOTHER = ("to", "type_as", "expand_as", "view_as", "reshape_as")


class Outside:
    """The weights and biases that code outside their layer computes with: central differences, a tied decoder.

    A binary layer hands its binarized weight to such code while it trains and as it is evaluated, the packed one its signs, and
    a bias that became the norm's is gone: the layer would not be the same network in each.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        # Name of a parameter -> what is computed with it; only what reaches an output counts.
        self.used: dict[str, str] = {}
        stack, seen = [node for node in flow.record.graph.nodes if node.op == "output"], set[fx.Node]()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            read = _data(flow, node)
            for item in read:
                if item.op == "get_attr":
                    self.used.setdefault(str(item.target), flow.name(node))
            stack.extend(read)
            if node.op == "call_module" and ".parametrizations." in f".{node.target}":
                self.used.setdefault(str(node.target), "a parametrization called by itself")
        self._ids = {id(tensor): name for name in self.used if (tensor := self._parameter(name)) is not None}

    def _parameter(self, name: str) -> nn.Parameter | None:
        holder, _, last = name.rpartition(".")
        module = self.flow.record.modules.get(holder)
        return None if module is None else module._parameters.get(last)

    def reason(self, path: str, module: nn.Module) -> str:
        """Why a layer stays, or an empty string."""
        inside = f"{path}." if path else ""
        names = [name for name in self.used if name.startswith(inside)]
        # The same parameter under another name: tied weights.
        names += [self._ids[id(tensor)] for tensor in module.parameters() if id(tensor) in self._ids]
        if not names:
            return ""
        what = "weight" if "weight" in names[0] else names[0].rpartition(".")[2]
        return f"the network computes with its {what} outside its own call too ({self.used[names[0]]})"


def _data(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """The tensors whose values a node reads."""
    name, tensors = flow.name(node), flow.tensors(node)
    if node.op != "call_function":
        return tensors
    if name.startswith("new_") or name.endswith("_like"):
        return []
    return tensors[:1] if name in _LIKE_ANOTHER else tensors
