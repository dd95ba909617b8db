"""What one run of a network computes, counted per sample: multiply-accumulates and elementwise operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bidensify.nn import RPReLU
from bidensify.rewrite.kinds import is_norm, is_pass
from bidensify.rewrite.macs import macs_of
from bidensify.rewrite.record.recorded import Record, TensorSpec, plain_name, scope_of

__all__ = ["LayerCall", "calls_of", "functions_of", "layer_work", "numel", "per_element"]

# What moves or describes data without computing on it.
_MOVES_TEXT = (
    "view reshape permute transpose flatten unflatten ravel contiguous to type float half bfloat16 double int long bool "
    "type_as cat concat concatenate stack hstack vstack split chunk tensor_split unbind getitem setitem size shape dim "
    "numel unsqueeze squeeze expand expand_as repeat repeat_interleave tile pad roll flip clone detach narrow select "
    "index_select gather scatter movedim moveaxis swapaxes swapdims pixel_shuffle pixel_unshuffle unfold fold t T mT "
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_full new_empty copy requires_grad is_floating_point "
    "device dtype is_cuda get_device item tolist dropout dropout1d dropout2d dropout3d alpha_dropout identity data "
    "meshgrid arange zeros ones empty full broadcast_to broadcast_tensors channel_shuffle native_channel_shuffle"
)
_MULTIPLIES_TEXT = (
    "matmul mm bmm mv dot addmm addbmm baddbmm einsum tensordot linear bilinear conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d scaled_dot_product_attention multi_head_attention_forward chain_matmul multi_dot "
    "inner outer"
)
_MOVES, _MULTIPLIES = frozenset(_MOVES_TEXT.split()), frozenset(_MULTIPLIES_TEXT.split())
# Of the functions above, layers written as functions: one of their factors is a weight.
_LAYERS = frozenset(name for name in _MULTIPLIES if name.startswith("conv") or "linear" in name)
_STILL = (nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)


@dataclass(frozen=True)
class LayerCall:
    """One call: shapes of its first input and of its output (the largest of several), its node."""

    input: tuple[int, ...]
    output: tuple[int, ...]
    node: fx.Node


def numel(shape: Iterable[int]) -> int:
    """Elements per sample of a shape that begins with the batch."""
    count = 1
    for size in list(shape)[1:]:
        count *= size
    return count


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, TensorSpec):
        return [value.shape]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [shape for item in value for shape in _shapes(item)]
    return []


def _largest(value: Any) -> tuple[int, ...]:
    return max(_shapes(value), key=numel, default=())


def calls_of(record: Record) -> dict[str, list[LayerCall]]:
    """Path -> calls of every leaf layer."""
    calls: dict[str, list[LayerCall]] = defaultdict(list)
    for node in record.graph.nodes:
        if node.op == "call_module":
            first = node.all_input_nodes[0].meta.get("spec") if node.all_input_nodes else None
            calls[str(node.target)].append(LayerCall(_largest(first), _largest(node.meta.get("spec")), node))
    return calls


def per_element(module: nn.Module) -> int:
    """Elementwise operations per element of a layer that is no convolution."""
    if isinstance(module, _STILL) or is_pass(module):
        return 0
    if isinstance(module, RPReLU):
        return 3
    return 2 if is_norm(module) else 1


@dataclass
class Work:
    """Per sample: multiply-accumulates, those of them whose factors are both activations, elementwise operations."""

    macs: int = 0
    products: int = 0
    elements: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.products + other.products, self.elements + other.elements)


def layer_work(module: nn.Module, call: LayerCall) -> Work:
    """What one call of a full-precision layer computes."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return Work(macs_of(module, call.output))
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            macs = _counted(module, call.node)
        return Work(macs, _attended(module, call.node) if isinstance(module, nn.MultiheadAttention) else 0)
    return Work(elements=per_element(module) * numel(call.output))


def functions_of(record: Record) -> tuple[dict[str, Work], tuple[str, ...]]:
    """Path of a block -> what the functions in its own code compute.

    Returns:
        The counts, and a line for each function whose multiply-accumulates could not be counted.
    """
    found: dict[str, Work] = defaultdict(Work)
    failures: dict[str, str] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in record.graph.nodes:
            if node.op != "call_function":
                continue
            name = plain_name(node.target)
            path = next((block for block, _ in reversed(scope_of(node))), "")
            shape = _largest(node.meta.get("spec"))
            if name in _MOVES or not shape:
                continue
            if name not in _MULTIPLIES:
                found[path] += Work(elements=numel(shape))
                continue
            try:
                macs = _counted(node.target, node)
            except Exception as error:
                failures[f"{path or '(model)'}: {name}"] = f"{type(error).__name__}: {str(error)[:80]}"
                continue
            weighs = name in _LAYERS or any(_fixed(factor) for factor in node.all_input_nodes)
            found[path] += Work(macs, 0 if weighs else macs)
    return found, tuple(f"{where} ({why})" for where, why in failures.items())


def _fixed(node: fx.Node) -> bool:
    """Whether a value is made of parameters and buffers alone."""
    if node.op == "call_function" and node.all_input_nodes:
        return all(_fixed(source) for source in node.all_input_nodes)
    return node.op == "get_attr"


def _attended(module: nn.MultiheadAttention, node: fx.Node) -> int:
    """Multiply-accumulates per sample of queries with keys and of attention with values, without the projections."""
    given = [*node.args, *(node.kwargs[name] for name in ("query", "key") if name in node.kwargs)][:2]
    shapes = [value.meta["spec"].shape for value in given if isinstance(value, fx.Node)]
    queries, keys = ([shape[-2 if module.batch_first or len(shape) == 2 else 0] for shape in shapes] * 2)[:2]
    keys += (module.bias_k is not None) + module.add_zero_attn
    return int(2 * queries * keys * module.embed_dim)


def _counted(function: Any, node: fx.Node) -> int:
    """Multiply-accumulates per sample of one call, by torch's counter, on fake tensors of the recorded shapes."""

    def fake(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return _materialize(value.meta.get("spec"))
        return value

    args, kwargs = fx.map_arg(node.args, fake), fx.map_arg(node.kwargs, fake)
    # Attention folds heads and windows into its first dimension: the batch is the network's input's.
    batches = [n.meta["spec"].shape[0] for n in node.graph.nodes if n.op == "placeholder" and _is_input(n)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused operator hides the products from the counter
    try:
        # Written out as products: of the fused attention on a CPU torch's counter knows nothing.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2 // max(batches, default=1)


def _is_input(node: fx.Node) -> bool:
    spec = node.meta.get("spec")
    return str(node.name).startswith("input_") and isinstance(spec, TensorSpec) and len(spec.shape) > 1


def _materialize(spec: Any) -> Any:
    if isinstance(spec, TensorSpec):
        return torch.empty(spec.shape, dtype=spec.dtype)
    if isinstance(spec, dict):
        return {key: _materialize(value) for key, value in spec.items()}
    if isinstance(spec, (tuple, list)):
        return type(spec)(_materialize(value) for value in spec)
    return spec
