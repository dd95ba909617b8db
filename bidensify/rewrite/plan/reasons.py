"""Why a layer stays in full precision by default: where it stands in the network, what its forward does."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.utils import parametrize, prune

from bidensify.config import BidensifyConfig
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.plan.flow import Flow
from bidensify.rewrite.plan.outside import Outside
from bidensify.rewrite.record.recorded import scope_of

__all__ = ["KINDS", "default_reason", "unusual_layer", "weight_maker"]

KINDS = ("conv2d", "conv_transpose2d", "linear")
# At most so many channels hold values (a colour, a flow, a depth), whose signs alone say next to nothing.
_RAW = 3
# The largest window of a pooling that halves a map; and functions that take every other pixel, or every other patch.
_WINDOW = 3
_STRIDED = ("getitem", "pixelunshuffle", "unfold")
_SAMPLERS = ("grid_sample", "grid_sampler", "deform_conv2d")
# What makes coordinates of a layer's output.
_ON_THE_WAY = (
    "add", "sub", "rsub", "mul", "div", "truediv", "neg", "tanh", "sigmoid", "clamp", "getitem", "split", "chunk", "unbind",
    "cat", "stack", "flip", "expand", "repeat", "interpolate",
)  # fmt: skip


def _on_single_pixel(flow: Flow, node: fx.Node) -> bool:
    source = flow.data_input(node)
    shape, out = flow.shape(source) if source is not None else None, flow.shape(node)
    return shape is not None and out is not None and shape[2:] == (1, 1) and out[2:] == (1, 1)


def _is_pooled(flow: Flow, node: fx.Node) -> bool:
    """Whether the map of one pixel that a layer reads is one at every size of the image: it was pooled, not strided down."""
    current = flow.data_input(node)
    while current is not None:
        source = flow.data_input(current)
        if source is None:
            return True
        if flow.positions(source) != 1:
            break
        current = source
    if (
        current is None
        or flow.is_layer(current)
        or flow.is_resize(current)
        or flow.name(current).lower().replace("_", "") in _STRIDED
    ):
        return False
    module = flow.module(current)
    kernel = getattr(module, "kernel_size", None) if module is not None else None
    if kernel is None and "pool" in flow.name(current) and not flow.name(current).startswith("adaptive"):
        kernel = current.args[1] if len(current.args) > 1 else current.kwargs.get("kernel_size")
    # A window of two or three pixels halves a map, whatever its size; one of seven is the whole of ResNet's last map.
    return not isinstance(kernel, (int, tuple, list)) or max([kernel] if isinstance(kernel, int) else kernel) > _WINDOW


def _has_norm(flow: Flow, node: fx.Node) -> bool:
    """Whether a BatchNorm stands behind a layer already, and trains as it did."""
    behind = flow.only_user(node)
    norm = flow.module(behind) if behind is not None else None
    return norm is not None and isinstance(norm, nn.modules.batchnorm._BatchNorm)


def _is_gate(flow: Flow, node: fx.Node) -> bool:
    """The layer's output is squashed (sigmoid, softmax, ...), reshaped or indexed or not, and then multiplies something."""
    current = flow.only_user(node)
    while current is not None and (
        flow.is_norm(current)
        or flow.is_pass(current)
        or flow.is_reorder(current)
        or flow.is_resize(current)
        or flow.name(current) == "getitem"
    ):
        current = flow.only_user(current)
    if current is not None and flow.name(current) == "add" and flow.is_scaling(current):
        current = flow.only_user(current)
    by_hand = current is not None and flow.is_hand_written_gate(current)
    if current is None or not (by_hand or flow.is_gate(current)):
        return False
    reached = flow.forward_until(
        current,
        stop=lambda n: flow.name(n) in ("mul", "matmul", "bmm"),
        follow=lambda n: (
            flow.is_pass(n)
            or flow.is_reorder(n)
            or flow.is_resize(n)
            or flow.name(n) in ("expand", "expand_as", "add", "sub")
            or (by_hand and flow.is_scaling(n))
        ),
    )
    return any(True for _ in reached)


def _is_location(flow: Flow, node: fx.Node) -> bool:
    """The layer's output says where another tensor is sampled (deformable attention and convolution): numbers, not features."""
    seen, stack = {node}, [node]
    while stack:
        item = stack.pop()
        for user in item.users:
            if flow.name(user) in _SAMPLERS:
                # What is sampled comes first, where it is sampled after it.
                if item in flow.tensors(user)[1:]:
                    return True
            elif user not in seen and (flow.is_pass(user) or flow.is_reorder(user) or flow.name(user) in _ON_THE_WAY):
                seen.add(user)
                stack.append(user)
    return False


def _is_predictor(flow: Flow, node: fx.Node) -> bool:
    """No layer, norm or block reads the layer's output any more: it is the network's, or nobody's.

    Features of a backbone end in a norm or a residual add; a prediction does not. A prediction that is refined (optical
    flow) goes on into the next round as well: what tells it from features is that it has values, not channels. An auxiliary
    head runs in evaluation mode too, where nobody reads it.
    """
    channels = getattr(flow.module(node), "out_channels", None)
    if channels is not None and channels <= _RAW:
        # Behind it may stand a norm, and layers on raw values (the mean that EDSR adds).
        ways = flow.forward_until(
            node,
            stop=lambda n: n.op == "output",
            follow=lambda n: not flow.is_layer(n) or getattr(flow.module(n), "in_channels", _RAW + 1) <= _RAW,
        )
        if any(True for _ in ways):
            return True
    if _is_last(flow, node):
        return True
    # The network reads a prediction of its own again (HRNet-OCR gathers regions by it): it is given out beside another
    # one of its width.
    return (
        channels is not None
        and _is_given_out(flow, node)
        and any(
            getattr(flow.module(other), "out_channels", None) == channels and _is_last(flow, other)
            for other in flow.record.graph.nodes
            if other is not node and flow.is_layer(other)
        )
    )


def _is_last(flow: Flow, node: fx.Node) -> bool:
    """Whether no layer, norm or block reads what the layer gave."""
    stack, seen = list(node.users), set()
    while stack:
        item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        if flow.is_layer(item) or flow.is_norm(item):
            return False
        if flow.is_add(item) and any(
            flow.ancestors(other, scope_of(item)) & flow.ancestors(node, scope_of(item))
            and flow.has_upstream_layer(other)
            for other in flow.tensors(item)
            if node not in flow.ancestors(other)
        ):
            return False
        stack.extend(item.users)
    return True


def _is_given_out(flow: Flow, node: fx.Node) -> bool:
    """Whether what the layer gave is an output of the network, as it is or as probabilities."""
    ways = flow.forward_until(
        node,
        stop=lambda n: n.op == "output",
        follow=lambda n: flow.is_pass(n) or flow.is_resize(n) or flow.is_gate(n),
    )
    return any(True for _ in ways)


def _is_raw(flow: Flow, node: fx.Node) -> bool:
    """Whether a layer reads a concatenation of images and predictions, none of which has more than a few channels."""
    source = flow.data_input(node)
    if source is None or flow.name(source) not in ("cat", "concat", "concatenate"):
        return False
    return all(
        len(shape) == 4 and shape[1] <= _RAW for shape in (flow.shape(item) or () for item in flow.tensors(source))
    )


def default_reason(flow: Flow, layer: LayerPlan, nodes: list[fx.Node], config: BidensifyConfig) -> str:
    """Why the layer stays in full precision by default, or an empty string."""
    if not nodes:
        return "never called in the recorded run"
    if layer.kind not in KINDS:
        return f"{layer.kind} is out of reach"
    if layer.kind == "linear":
        dims = {len(flow.shape(node) or ()) for node in nodes}
        if config.linear == "off":
            return "linear layers are off (linear='off')"
        if config.linear == "pointwise" and dims != {4}:
            return "linear layer on tokens (linear='pointwise' takes NHWC maps alone)"
        if dims & {1, 2}:
            return "linear layer on vectors"
    if not any(flow.reads_input(node) for node in nodes):
        return "on constants alone, such as a table of positions"
    if config.keep_first and any(not flow.has_upstream_layer(node) for node in nodes):
        return "first layer on the image"
    if layer.kind != "linear" and (layer.in_channels <= _RAW or all(_is_raw(flow, node) for node in nodes)):
        return f"on {layer.in_channels} raw values, as a first layer is"
    # One of several calls says more of the example's size than of the layer (a head that all levels of a pyramid share).
    if layer.kind != "linear" and all(_on_single_pixel(flow, node) and _is_pooled(flow, node) for node in nodes):
        return "on a pooled 1×1 map"
    if any(_is_gate(flow, node) for node in nodes):
        return "gate"
    if any(_is_location(flow, node) for node in nodes):
        return "says where to sample"
    if config.keep_last and any(_is_predictor(flow, node) for node in nodes):
        return "prediction layer"
    # An image of the user's own says which size it will be; one of ours says nothing.
    if flow.record.given and all(flow.positions(node) == 1 and not _has_norm(flow, node) for node in nodes):
        return "gives a 1×1 map, of which a new BatchNorm would see one value per image"
    return ""


def weight_maker(module: nn.Module) -> str:
    """What makes the weight that a layer convolves with."""
    if parametrize.is_parametrized(module, "weight"):
        parts = module.get_submodule("parametrizations.weight").children()
        return "the parametrization " + ", ".join(type(part).__name__ for part in parts)
    hooks = [type(hook) for hook in module._forward_pre_hooks.values()]
    hooks = [hook for hook in hooks if hook.__module__.startswith("torch.nn.utils.")]
    if hooks:
        return "the hook " + ", ".join(hook.__name__ for hook in hooks)
    return f"the forward of {type(module).__name__}"


def unusual_layer(flow: Flow, layer: LayerPlan, module: nn.Module, outside: Outside) -> str:
    """Why a layer that is called is no convolution with one weight of its own, or an empty string."""
    if layer.calls == 0 or layer.kind not in KINDS:
        return ""
    if used := outside.reason(layer.path, module):
        return used
    uses = flow.record.weights.get(layer.path, [])
    if len(uses) == layer.calls and len(set(uses)) == 1:
        if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            return (
                "its weights are pruned, and a bit has no zero (torch.nn.utils.prune.remove makes them plain weights)"
            )
        return ""
    return f"the forward of {type(module).__name__} is not one convolution with its weight"
