"""The entries of a plan: what a rewrite does to one layer, one activation, one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from bidensify.methods import LayerSpec
from bidensify.rewrite.blocks.arguments import ArgumentPath, Fixed
from bidensify.rewrite.blocks.edit import BlockEdit
from bidensify.rewrite.blocks.surroundings import Attribute
from bidensify.rewrite.fields import MANY, STRICT, Channels, Count, MethodName, ModulePath, Size, Slope, Text, one_of

__all__ = ["ActivationPlan", "BlockPlan", "LayerPlan", "NewActivation", "slope_fields", "window_of"]

REPLACES_ADD = "replaces the residual add"
_KINDS = ("linear", "function", "scripted", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
_PADDINGS, _PADDING_MODES = ("same", "valid"), ("zeros", "reflect", "replicate", "circular")
# (height, width), or fewer or more dimensions.
Sizes = Annotated[tuple[Size, ...], Field(max_length=8)]


def _two(sizes: Sequence[int]) -> tuple[int, int]:
    return int(sizes[0]), int(sizes[-1])


def slope_fields(activation: nn.Module, path: str) -> dict[str, Any]:
    """From what the slope of a replaced activation's negative side starts, by the names of ``LayerPlan``."""
    if isinstance(activation, nn.PReLU):
        return {"slope_from": path}
    return {"slope": float(activation.negative_slope)} if isinstance(activation, nn.LeakyReLU) else {}


def window_of(module: nn.Module) -> dict[str, Any]:
    """Where a convolution's window stands, by ``LayerPlan``'s names: what no weight's shape says. Of other layers nothing."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return {}
    found: dict[str, Any] = {}
    for name in ("padding", "dilation", "output_padding"):
        value = getattr(module, name, None)
        sizes = value if isinstance(value, (tuple, list)) else (value,)
        # A subclass may hold something of its own there.
        if all(isinstance(size, int) and 0 <= size <= 2**24 for size in sizes):
            found[name] = tuple(map(int, sizes))
    if module.padding in _PADDINGS:
        reach = tuple(dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size))
        # "same" of an even reach, and "valid", are sizes too.
        even = all(each % 2 == 0 for each in reach)
        found["padding"] = tuple(each // 2 for each in reach) if even else "same"
        if module.padding == "valid":
            found["padding"] = (0,) * len(reach)
    if module.padding_mode in _PADDING_MODES:
        found["padding_mode"] = module.padding_mode
    return found


@dataclass(frozen=True)
class LayerPlan:
    """One convolution or linear layer.

    Attributes:
        path: module path.
        kind: "conv2d", "conv_transpose2d", "linear" or "function".
        in_channels, out_channels: C_in, C_out.
        kernel_size, stride: (height, width) each.
        groups: of the convolution.
        output: (H, W) of the recorded output, or its token shape.
        macs: multiply-accumulates per sample over all calls of the record.
        calls: how often the record called it.
        action: "binary" or "keep".
        reason: why.
        way: "path" (exchanged where it stands) or "block" (its block's code changes too); empty if kept.
        method: the method's name; empty if kept.
        act_scale: granularity of the activation scale.
        act_bits: bits of an activation.
        bypass: whether the layer has its own full-precision bypass.
        norm: path of the BatchNorm that it absorbs, or None (it then gets one of its own).
        activation: whether the activation behind it becomes its own.
        layer_scale: path of the parameter (LayerScale's gamma) that its BatchNorm absorbs, or None.
        makes_weight: whether the layer's own code makes the weight that it convolves with (weight standardisation, a
            parametrization, a hook); what it makes is binarized.
        eligible: False for what is kept by default (stem, predictor, 1×1 map, gate, never called).
        int8: whether a layer that stays computes in int8.
        nonnegative: whether its input is never below 0: it comes from a ReLU that stays.
        slope: of the negative side of the leaky_relu that became its activation.
        slope_from: path of the PReLU, or of the parameter, from which its activation's slope starts, or None.
        padding, dilation, output_padding, padding_mode: of a convolution, as it has them; None where the plan does not say (of a
            linear layer, and in plans of releases that did not write them).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: Text
    kind: Annotated[str, one_of(*_KINDS)]
    in_channels: Size
    out_channels: Size
    kernel_size: Sizes
    stride: Sizes
    groups: Size
    output: Sizes
    macs: Count
    calls: Count
    action: Annotated[str, one_of("binary", "keep")]
    reason: Text
    way: Annotated[str, one_of("", "path", "block")] = ""
    method: MethodName = ""
    act_scale: Annotated[str, one_of("per_tensor", "per_channel", "none", "spatial")] = "per_tensor"
    act_bits: Annotated[int, one_of(1, 2)] = 1
    bypass: bool = False
    norm: ModulePath | None = None
    activation: bool = False
    layer_scale: ModulePath | None = None
    makes_weight: bool = False
    eligible: bool = True
    nonnegative: bool = False
    int8: bool = False
    slope: Slope = 0.0
    slope_from: ModulePath | None = None
    padding: Sizes | Annotated[str, one_of("same")] | None = None
    dilation: Sizes | None = None
    output_padding: Sizes | None = None
    padding_mode: Annotated[str, one_of(*_PADDING_MODES)] | None = None

    def spec(self, module: nn.Module | None = None, weight: Tensor | None = None) -> LayerSpec:
        """What the layer's method is told of it.

        Args:
            module: the layer itself, of which the dilation is read.
            weight: the latent weight to start from, where there are values.
        """
        linear = self.kind == "linear"
        dilation = getattr(module, "dilation", (1, 1))
        return LayerSpec(
            self.kind,
            self.in_channels,
            self.out_channels,
            self.groups,
            -1 if linear else 1,
            *(((1, 1),) * 3 if linear else (_two(self.kernel_size), _two(self.stride), _two(dilation))),
            nonnegative=self.nonnegative,
            weight=None if weight is None or weight.is_meta else weight.detach(),
        )

    @property
    def replaces_add(self) -> bool:
        """Whether its bypass stands for a residual add that is gone."""
        return REPLACES_ADD in self.reason

    @property
    def shape(self) -> str:
        """The layer's geometry as short text: "3×3 64→128 /2"."""
        text = "×".join(str(k) for k in self.kernel_size) + f" {self.in_channels}→{self.out_channels}"
        if max(self.stride, default=1) > 1:
            text += f" /{max(self.stride)}"
        if self.groups > 1:
            text += f" g{self.groups}"
        return text


@dataclass(frozen=True)
class ActivationPlan:
    """One module whose role changes at its own path.

    Attributes:
        path: module path.
        action: "replace" (the method's activation of ``channels``), "absorbed" (its work moved into a binary layer: it
            hands its input through), "by_width" (called on several widths: the method's activation for each of ``widths``,
            the network's own for any other) or "norm" (a fused norm+act whose norm was absorbed: its activation alone stays).
        channels: C.
        dim: the channel dimension, 1 or -1.
        method: whose activation.
        widths: of "by_width".
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: ModulePath
    action: Annotated[str, one_of("replace", "absorbed", "by_width", "norm")]
    channels: Channels = 0
    dim: Annotated[int, one_of(1, -1)] = 1
    method: MethodName = ""
    widths: Annotated[tuple[Channels, ...], Field(max_length=64)] = ()


@dataclass(frozen=True)
class NewActivation:
    """An activation that a block gets as a new child.

    Attributes:
        channels: C.
        dim: the channel dimension, 1 or -1.
        method: whose activation.
        slope, slope_from: as ``LayerPlan`` has them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    channels: Channels
    dim: Annotated[int, one_of(1, -1)]
    method: MethodName
    slope: Slope = 0.0
    slope_from: ModulePath | None = None


@dataclass(frozen=True)
class BlockPlan:
    """One block whose code changes.

    Attributes:
        path: module path of the block ("" is the network itself).
        edits: what changes, by step of its trace.
        varying: paths of the arguments that the block's new code takes.
        constants: arguments, and items of them, that it was specialised to.
        attributes: what its code reads of itself, its children and their configurations.
        modules: new children by name.
        notes: what the edits do, in words.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: ModulePath
    edits: Annotated[tuple[BlockEdit, ...], MANY]
    varying: Annotated[tuple[ArgumentPath, ...], MANY] = ()
    constants: Annotated[tuple[Fixed, ...], MANY] = ()
    attributes: Annotated[tuple[Attribute, ...], MANY] = ()
    modules: Mapping[Text, NewActivation] = field(default_factory=dict)
    notes: Annotated[tuple[Text, ...], MANY] = ()
