"""The weight of a binary layer: its binarizer, and what a layer convolves with where that is not its parameter itself.

A subclass of a convolution may standardise its weight, a parametrization or a hook may make it. Its binary layer is the
binary layer of the weight so made: ``s_o = mean |w|``, ``sign(w)`` of the tensor that enters the convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from bidensify.nn import fused, native
from bidensify.nn.flags import frozen_flags
from bidensify.nn.ste import binarize_weight

__all__ = [
    "WEIGHTED_FUNCTIONS",
    "UsedWeight",
    "WeightBinarizer",
    "copy_model",
    "make_weight",
    "pretrained_spread",
    "used_weight",
    "weight_argument",
]

# What a convolution or linear layer calls with (input, weight, ...).
WEIGHTED_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    nn.functional.linear,
)  # fmt: skip


def _row_means(rows: Tensor) -> Tensor:
    """(n,) float32: the mean magnitude of each row."""
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    total: Tensor = torch.linalg.vector_norm(rows, 1, 1, dtype=wide)
    return (total / rows.shape[1]).float()


class WeightBinarizer(nn.Module):
    """w_b = s_o * sign(w) with s_o = mean |w| over all the weights that feed output channel o.

    s_o takes no gradient; STE: identity where |w| <= 1, else 0. BiDense (arXiv 2411.10346), eq. 2, after XNOR-Net.

    Args:
        transposed: the weight is (C_in, C_out / groups, kH, kW).
        groups: the layer's groups (needed to find the output channel in a transposed weight).
        scaled: False gives s_o = 1 (BNN).
    """

    def __init__(self, *, transposed: bool = False, groups: int = 1, scaled: bool = True) -> None:
        super().__init__()
        self.transposed = transposed
        self.groups = groups
        self.scaled = scaled

    def scale(self, weight: Tensor) -> Tensor:
        """s_o, broadcastable to ``weight``; detached."""
        weight = weight.detach()
        if not self.scaled:
            return weight.new_ones(())
        if not self.transposed:
            return weight.abs().mean(tuple(range(1, weight.dim())), keepdim=True)
        # (groups, C_in / groups, C_out / groups, kH, kW): the same scale for every input channel of a group.
        grouped = weight.abs().reshape(self.groups, -1, *weight.shape[1:])
        scale = grouped.mean((1, *range(3, grouped.dim())), keepdim=True)
        return scale.expand(-1, grouped.shape[1], *scale.shape[2:]).reshape(weight.shape[0], *scale.shape[2:])

    def channel_scale(self, weight: Tensor) -> Tensor | None:
        """s_o as (C_out,) float32, its mean taken in float64, or None where it is 1."""
        if not self.scaled:
            return None
        weight = weight.detach()
        if not self.transposed:
            return _row_means(weight.flatten(1))
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        return _row_means(grouped.transpose(1, 2).flatten(0, 1).flatten(1))

    def native(self, weight: Tensor) -> bool:
        """Whether the training kernels binarize ``weight``: output channels outermost in memory, float32."""
        return (
            not self.transposed
            and weight.dtype == torch.float32
            and native.supports(weight)
            and native.geometry(weight, 1) is not None
        )

    def forward(self, weight: Tensor) -> Tensor:
        if self.native(weight):
            return fused.binarize_rows(weight, scaled=self.scaled)[0]
        return binarize_weight(weight, self.scale(weight))

    def extra_repr(self) -> str:
        return "" if self.scaled else "scaled=False"


def weight_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The weight among the arguments of one of ``WEIGHTED_FUNCTIONS``."""
    return args[1] if len(args) > 1 else kwargs.get("weight")


class UsedWeight(TorchFunctionMode):
    """Hands the weight of every convolution that runs under it through ``change``."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in WEIGHTED_FUNCTIONS:
            if len(args) > 1:
                args = (args[0], self.change(args[1]), *args[2:])
            else:
                options["weight"] = self.change(options["weight"])
        return func(*args, **options)


def make_weight(layer: nn.Module) -> None:
    """Lets the hooks of ``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` set ``layer.weight`` anew."""
    for hook in layer._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(layer, ())


def used_weight(layer: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The float tensor that a layer convolves with, as its own code makes it of its parameters; detached.

    Args:
        layer: an ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear`` of any subclass; it is left as it is.
        forward: its bare forward, by default ``layer.forward``.

    Raises:
        RuntimeError: its forward does not convolve exactly once.
    """
    reference = next(p for p in layer.parameters() if p.is_floating_point())
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (1, layer.in_features)
    else:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        # One pixel more than the kernel reaches, so that any padding leaves an output.
        sizes = (d * (k - 1) + 2 for d, k in zip(layer.dilation, layer.kernel_size))
        shape = (1, layer.in_channels, *sizes)
    probe = torch.zeros(shape, dtype=reference.dtype, device=reference.device)
    seen: list[Tensor] = []

    def note(weight: Tensor) -> Tensor:
        seen.append(weight.detach())
        return weight

    with torch.no_grad(), frozen_flags(layer), torch.random.fork_rng(devices=[]):
        make_weight(layer)
        with UsedWeight(note):
            (layer.forward if forward is None else forward)(probe)
    if len(seen) != 1:
        raise RuntimeError(f"the forward of {type(layer).__name__} calls {len(seen)} convolutions, not one")
    return seen[0]


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also where a hook keeps a computed weight on a layer (torch copies no tensor with a gradient)."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def parametrized(layer: nn.Module) -> bool:
    """Whether torch's parametrizations make the layer's weight."""
    return parametrize.is_parametrized(layer, "weight")


def pretrained_spread(
    weight: Tensor, *, transposed: bool = False, groups: int = 1, stride: Sequence[int] = (1,)
) -> Tensor:
    """Standard deviation (C_out,) of the float layer's output for white input of unit variance: the weights' L2 norm.

    A BatchNorm that is added behind a layer without one starts from it, so that the output keeps its scale.

    Args:
        weight: as the layer has it.
        transposed, groups: as ``WeightBinarizer`` has them.
        stride: of a transposed convolution: of its taps, only one in each stride's step reaches an output.
    """
    weight = weight.detach().float()
    if transposed:
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        norms = (grouped.pow(2).sum((1, *range(3, grouped.dim()))) / prod(stride)).sqrt().flatten()
    else:
        norms = weight.flatten(1).norm(dim=1)
    return norms.clamp(min=1e-3)
