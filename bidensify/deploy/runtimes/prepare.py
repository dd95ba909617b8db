"""Networks made ready for a runtime without torch, and their programs: what comes before packed layers is read in parts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves, tree_map

from bidensify.deploy.layers import PackedLayer
from bidensify.deploy.operator import SPEC_VERSION
from bidensify.errors import ConfigError
from bidensify.nn import BinaryLayer

__all__ = ["LINEAR", "flat", "prepared", "read_in_parts"]

_aten = torch.ops.aten
# Of a spec's kinds.
LINEAR = 2
_MOST_PARTS = 64


def prepared(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode as runtimes take it: it enters in channels_last and holds no bits twice.

    Raises:
        ConfigError: the network is latent.
    """
    latent = [path for path, module in model.named_modules() if isinstance(module, BinaryLayer)]
    if latent:
        raise ConfigError(
            f"export: {latent[0]!r} and {len(latent) - 1} more layers are latent; give bidensify.pack(model)"
        )
    made = copy.deepcopy(model).eval().cpu()
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


def read_in_parts(graph: fx.Graph) -> int:
    """Lets packed layers read the parts of concatenations and nearest-neighbour upsamplings; returns how many do.

    A concatenation that nothing else reads is then never made.
    """
    changed = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.bidensify.packed_layer.default:
            continue
        parts, up, spec = node.args[0], node.args[1], node.args[4]
        if spec[0] != SPEC_VERSION or spec[1] == LINEAR:
            continue
        found = [each for part, times in zip(parts, up) for each in _parts(part, times)]
        if [part for part, _ in found] != list(parts) and len(found) <= _MOST_PARTS:
            node.args = ([part for part, _ in found], [times for _, times in found], *node.args[2:])
            changed += 1
    graph.eliminate_dead_code()
    return changed


def _parts(node: Any, up: int) -> list[tuple[Any, int]]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4:
        return [(node, up)]
    if node.target is _aten.cat.default and len(node.args) > 1 and node.args[1] in (1, -3):
        return [each for part in node.args[0] for each in _parts(part, up)]
    if node.target is _aten.upsample_nearest2d.vec:
        times = _factor(node.args[0].meta["val"], value)
        if times is not None:
            return _parts(node.args[0], up * times)
    # In evaluation it does nothing.
    if node.target is _aten.dropout.default and node.args[2] is False:
        return _parts(node.args[0], up)
    return [(node, up)]


def _factor(x: Tensor, y: Tensor) -> int | None:
    """The power of two by which height and width grow; there alone is every rounding of indices exact."""
    for times in (2, 4, 8, 16, 32):
        if all(statically_known_true(y.shape[axis] == times * x.shape[axis]) for axis in (2, 3)):
            return times
    return None
