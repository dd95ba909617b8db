"""Networks made ready for a runtime without torch, and their programs: what comes before packed layers is read in parts."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves, tree_map

from bidensify.deploy.layers import PackedLayer
from bidensify.deploy.runtimes.nodes import enlarged
from bidensify.deploy.runtimes.writes import Writes
from bidensify.errors import ConfigError
from bidensify.nn import BinaryLayer, Int8, int8_layers

__all__ = ["LINEAR", "flat", "in_floats", "of_images", "prepared", "read_in_parts"]

_aten = torch.ops.aten
# Of a spec's kinds.
LINEAR = 2
_MOST_PARTS = 64


class _Rounding(nn.Module):
    """``Int8`` of a layer whose weight is rounded already, in the operators that a runtime knows.

    The product behind it is one of floats. OpenVINO would make it int8 if the weight were rounded by an operator, too, and on a
    processor without VNNI (AVX2 alone) the sums of two products then saturate at 16 bits; XNNPACK's int8 convolutions give int8.

    Raises:
        ConfigError: it has no range.
    """

    def __init__(self, of: Int8, path: str, pt2e: bool) -> None:
        super().__init__()
        if of.affine is None:
            raise ConfigError(
                f"export: the int8 layer {path!r} has no range of its input: bidensify.calibrate(student, images) before pack"
            )
        self.step, self.zero = of.affine
        self.pt2e = pt2e
        if pt2e:
            importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")  # defines the operators

    def forward(self, x: Tensor) -> Tensor:
        if not self.pt2e:
            return torch.fake_quantize_per_tensor_affine(x.float(), self.step, self.zero, 0, 255).to(x.dtype)
        ops = torch.ops.quantized_decomposed
        given = (self.step, self.zero - 128, -128, 127, torch.int8)
        rounded: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(x.float(), *given), *given)
        return rounded.to(x.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight as it is."""
        return weight


def in_floats(model: nn.Module) -> str:
    """What is to be said of a network's int8 layers, or ""."""
    paths = [path for path, layer in int8_layers(model) if layer.int8 is not None]
    if not paths:
        return ""
    some = ", ".join(map(repr, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return (
        f"{len(paths)} int8 layers ({some}) hold and read values that are rounded to int8, and multiply them in float"
    )


def prepared(model: nn.Module, pt2e: bool = True) -> nn.Module:
    """A copy in evaluation mode as runtimes take it: it enters in channels_last, holds no bits twice, and its int8 layers hold
    rounded weights.

    Args:
        pt2e: the runtime rounds by pt2e's operators (ExecuTorch), rather than by ``fake_quantize`` (OpenVINO).

    Raises:
        ConfigError: the network is latent, or an int8 layer was not calibrated.
    """
    latent = [path for path, module in model.named_modules() if isinstance(module, BinaryLayer)]
    if latent:
        raise ConfigError(
            f"export: {latent[0]!r} and {len(latent) - 1} more layers are latent; give bidensify.pack(model)"
        )
    made = copy.deepcopy(model).eval().cpu()
    for path, layer in int8_layers(made):
        if layer.int8 is not None:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight.data = layer.int8.weight(weight).detach()
            layer.int8 = _Rounding(layer.int8, path, pt2e)  # type: ignore[assignment]
    for module in made.modules():
        if isinstance(module, PackedLayer):
            # Kernels read the words; the stored bits would be in the file a second time.
            del module.bits
    for tensor in (*made.parameters(), *made.buffers()):
        # XNNPACK's passes want weights as torch makes them.
        tensor.requires_grad_(False)
        tensor.data = tensor.data.contiguous()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(_last, args), tree_map(_last, kwargs)

    made.register_forward_pre_hook(enter, with_kwargs=True)
    return made


def _last(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
        return value
    # One pixel lies in both orders, and XNNPACK refuses a copy that is none.
    return value if value.shape[2:] == (1, 1) else value.to(memory_format=torch.channels_last)


def flat(args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors among a call's inputs or outputs, in the order of the program's."""
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def of_images(spec: Sequence[int]) -> bool:
    """Whether a packed layer, by its integers, reads (N, C, H, W): no linear one, nor one of version 2, which reads tokens."""
    return spec[0] == 1 and spec[1] != LINEAR


def read_in_parts(graph: fx.Graph) -> int:
    """Lets packed layers read the parts of concatenations and nearest-neighbour upsamplings; returns how many do.

    A concatenation that nothing else reads is then never made. One whose parts, or which itself, is written in place before
    the layer reads stays. Parts without channels, which some encoders hand on for
    levels that they lack, are left out: ExecuTorch has no such tensors.
    """
    for node in graph.nodes:
        if node.target is _aten.cat.default:
            filled = [part for part in node.args[0] if not _empty(part)]
            node.args = (filled or node.args[0], *node.args[1:])
    changed, writes = 0, Writes(graph)
    for node in list(graph.nodes):
        if node.target is not torch.ops.bidensify.packed_layer.default:
            continue
        parts, up, spec = node.args[0], node.args[1], node.args[4]
        if not of_images(spec):
            continue
        found = [each for part, times in zip(parts, up) for each in _parts(part, times, node, writes)]
        if [part for part, _ in found] != list(parts) and len(found) <= _MOST_PARTS:
            node.args = ([part for part, _ in found], [times for _, times in found], *node.args[2:])
            changed += 1
    graph.eliminate_dead_code()
    return changed


def _empty(node: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(statically_known_true(size == 0) for size in value.shape)


def _parts(node: Any, up: int, reader: fx.Node, writes: Writes) -> list[tuple[Any, int]]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return [(node, up)]
    inputs, times = [], 1
    if node.target is _aten.cat.default and len(node.args) > 1 and node.args[1] in (1, -3):
        inputs = node.args[0]
    elif node.target is _aten.upsample_nearest2d.vec:
        factors = enlarged(node, 32)
        # Of a power of two alone is every rounding of indices exact.
        if factors in ((2, 2), (4, 4), (8, 8), (16, 16), (32, 32)):
            inputs, times = [node.args[0]], factors[0]
    # In evaluation it does nothing.
    elif node.target is _aten.dropout.default and node.args[2] is False:
        inputs = [node.args[0]]
    if not inputs or writes.between([node, *inputs], node, reader):
        return [(node, up)]
    return [each for part in inputs for each in _parts(part, up * times, reader, writes)]
