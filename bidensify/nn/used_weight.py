"""What a layer convolves with, where that is not its parameter itself.

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

from bidensify._util.modes import evaluation_flags
from bidensify.exact.latent import WEIGHTED_FUNCTIONS

__all__ = [
    "WEIGHTED_FUNCTIONS",
    "UsedWeight",
    "copy_model",
    "make_weight",
    "pretrained_spread",
    "used_weight",
]


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

    with torch.no_grad(), evaluation_flags(layer), torch.random.fork_rng(devices=[]):
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
