"""Packed layers: 1-bit weights held as bits, with BatchNorm folded into one scale and one bias per output channel.

y = activation(scale * alpha * dot + bias + bypass(x)), where dot is an exact integer (BiDense, arXiv 2411.10346, eq. 1-6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.deploy import direct, operator, reference
from bidensify.deploy.backends import check_kernel
from bidensify.deploy.between.deferred import Deferred
from bidensify.deploy.between.mode import unwatched
from bidensify.deploy.bits import signs_from_tiles, tiles_from_bits
from bidensify.deploy.run import Repeated
from bidensify.deploy.spec import PackedSpec
from bidensify.errors import ConfigError, FormatError
from bidensify.exact import own_codes
from bidensify.exact.latent import own_signal
from bidensify.nn import FrozenLayer
from bidensify.nn.torch_tools import one_step, traced

__all__ = ["PackedConv2d", "PackedConvTranspose2d", "PackedLayer", "PackedLinear", "packed_layers"]


@dataclass(frozen=True)
class PackedCounts:
    """What ``bidensify.summary`` counts of a packed layer.

    Attributes:
        binary_params: weights of one bit.
        float_params: side parameters.
        act_bits: bits of an activation.
        macs_per_output: binary multiply-accumulates per output element (a fraction in a strided transposed layer).
        work_per_input, work_per_output: elementwise operations per input and per output element.
    """

    binary_params: int
    float_params: int
    act_bits: int
    macs_per_output: Fraction
    work_per_input: int
    work_per_output: int


class PackedLayer(FrozenLayer):
    """Base of packed layers. Made by ``freeze`` or, empty, by ``empty_from_meta`` (``bidensify.deploy.freeze``).

    Attributes:
        spec: geometry and contents.
        bits: (ceil(weights / 8),) uint8, the signs of the weights in the order C_out, C_in / groups, kh, kw.
        side: (spec.side_length,) float32: thresholds, scale, bias and activation parameters in ``spec.layout``'s order.
        kernel: which kernel runs ("auto", "reference", "portable", "avx2", "avx512", "neon").
        binarizer: a method's own binarizer where its thresholds are not of DAB's form, else None.
        bypass: a bypass that kernels do not compute, else None.
        activation: an activation that kernels do not compute, else None.
    """

    bits: Tensor
    side: Tensor
    tiles: Tensor
    binarizer: Any
    kind = ""

    def __init__(self, spec: PackedSpec, kernel: str = "auto", device: torch.device | str | None = None) -> None:
        super().__init__()
        if spec.kind != self.kind:
            raise ConfigError(f"{type(self).__name__} holds a {self.kind!r} layer, got a spec of kind {spec.kind!r}")
        self.spec = spec
        self._ints = operator.spec_ints(spec)
        self._repeated = Repeated()
        self.kernel = check_kernel(kernel)
        self.binarizer = None
        self.bypass: nn.Module | None = None
        self.activation: nn.Module | None = None
        self.register_buffer("bits", torch.zeros(-(-spec.bits // 8), dtype=torch.uint8, device=device))
        self.register_buffer("side", torch.zeros(spec.side_length, dtype=torch.float32, device=device))
        self.register_buffer("tiles", torch.zeros(spec.tiles_shape, dtype=torch.int32, device=device), persistent=False)
        self.register_load_state_dict_post_hook(_arrange)  # type: ignore[no-untyped-call]

    def meta(self) -> dict[str, Any]:
        """What ``empty_from_meta`` needs, JSON-able."""
        own = [name for name in ("binarizer", "bypass", "activation") if getattr(self, name) is not None]
        data: dict[str, Any] = {"type": type(self).__name__, "spec": self.spec.to_dict()}
        return {**data, "own": own} if own else data

    def counts(self) -> PackedCounts:
        """What the layer holds and computes."""
        s = self.spec
        macs = Fraction(s.in_channels // s.groups * s.kernel[0] * s.kernel[1])
        if s.kind == "conv_transpose":
            macs /= s.stride[0] * s.stride[1]
        own = self.binarizer
        binarizer = own.work if own is not None else (4 if s.mean_threshold or s.alpha else 1) + 2 * (s.planes - 1)
        after = 2 + (s.bypass or self.bypass is not None) + (3 if s.slope else 0) + (self.activation is not None)
        return PackedCounts(s.bits, s.side_length, s.planes, macs, binarizer, after + 2 * s.offset + s.clamp)

    def arrange(self) -> None:
        """Brings the stored bits into the order that kernels read; called after every load."""
        if self.bits.device.type == "meta":
            return
        self.tiles = tiles_from_bits(self.bits, self.spec)

    def part(self, name: str) -> Tensor:
        """The side parameter ``name`` ("k", "scale", ...: see ``PackedSpec.layout``): a view."""
        start, length = self.spec.layout[name]
        return self.side[start : start + length]

    @property
    def weight(self) -> Tensor:
        """The unpacked signs, (C_out, C_in / groups, kh, kw) of -1 and +1; a new tensor at every read."""
        return signs_from_tiles(self.tiles, self.spec)

    @property
    def in_channels(self) -> int:
        """C_in."""
        return self.spec.in_channels

    @property
    def out_channels(self) -> int:
        """C_out."""
        return self.spec.out_channels

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        # The side parameters are a few floats per channel: `.to(bfloat16)` moves them but keeps their precision.
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def _again(self, x: Tensor) -> Tensor | None:
        """The result for an input as an earlier one, where the kernel alone is the layer and nothing watches."""
        if self.binarizer is not None or self.bypass is not None:
            return None
        buffers: Any = self._buffers
        y = direct.again(x, buffers["tiles"], buffers["side"], self.kernel, self._repeated)
        return None if y is None else self._activated(y)

    def _run(
        self,
        x: Tensor,
        spec: PackedSpec,
        outside: Callable[[Tensor], Tensor] = lambda y: y,
        given: Tensor | None = None,
    ) -> Tensor:
        """x: (N, C_in, H, W); ``outside`` brings (N, C_out, H', W') to the shape that the layer gives.

        ``given`` is x as the operator takes it, where that differs.
        """
        bare, made = self.binarizer is None and self.bypass is None, None
        if type(x) is Deferred:
            made = direct.from_parts(x, self.tiles, self.side, spec, self.kernel) if bare else None
            x = x if made is not None else x.make()
        if bare and made is None:
            kept = self._repeated if spec is self.spec else None
            made = direct.direct(x, self.tiles, self.side, spec, self.kernel, kept, given)
        if made is not None:
            return self._activated(outside(made))
        thresholds = levels = residual = None
        if self.binarizer is not None:
            thresholds, levels = unwatched(own_codes, self.binarizer, x)
        if self.bypass is not None:
            residual = own_signal(self.bypass, x, spec.output_size(x.shape[2], x.shape[3]))
        # Behind an activation that is called the operator cannot add it.
        late = residual if spec.bypass_last and self.activation is not None else None
        joins = None if residual is None or late is not None else outside(residual)
        ints = self._ints if spec is self.spec else operator.spec_ints(spec)
        y = operator.run_operator(
            self.kernel, x if given is None else given, self.tiles, self.side, ints, thresholds, levels, joins
        )
        y = self._activated(y)
        return y if late is None else y + outside(late)

    def _activated(self, y: Tensor) -> Tensor:
        return y if self.activation is None else self.activation(y)

    def _check_input(self, x: Tensor, dims: tuple[int, ...], channel_dim: int) -> None:
        if x.dim() not in dims or x.shape[channel_dim] != self.spec.in_channels:
            raise ConfigError(
                f"{type(self).__name__}: the input has shape {tuple(x.shape)}, the layer takes {self.spec.in_channels} "
                f"channels on dimension {channel_dim}"
            )

    # Code around a convolution reads these (transformers' TensorFlow padding).
    @property
    def kernel_size(self) -> tuple[int, int]:
        """(kh, kw)."""
        return self.spec.kernel

    @property
    def stride(self) -> tuple[int, int]:
        """(sh, sw)."""
        return self.spec.stride

    @property
    def dilation(self) -> tuple[int, int]:
        """(dh, dw)."""
        return self.spec.dilation

    @property
    def groups(self) -> int:
        """Of the convolution."""
        return self.spec.groups

    def extra_repr(self) -> str:
        s = self.spec
        text = f"{s.in_channels}, {s.out_channels}"
        if s.kind != "linear":
            text += f", kernel_size={s.kernel}, stride={s.stride}, padding={'same' if s.same else s.padding}"
            text += f", dilation={s.dilation}, groups={s.groups}"
        planes = f", planes={s.planes}" if s.planes > 1 else ""
        return f"{text}, bits={s.bits}{planes}, kernel={self.kernel!r}"


def _arrange(module: nn.Module, incompatible: Any) -> None:
    if isinstance(module, PackedLayer):
        if tuple(module.bits.shape) != (-(-module.spec.bits // 8),) or module.bits.dtype != torch.uint8:
            raise FormatError(
                f"bits of shape {tuple(module.bits.shape)} and dtype {module.bits.dtype} do not hold {module.spec.bits} weights"
            )
        module.arrange()


class PackedConv2d(PackedLayer):
    """(N, C_in, H, W) -> (N, C_out, H', W'), channels_last inside; see ``PackedLayer``."""

    kind = "conv"

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C_in, H, W), float32, bfloat16 or float16; the result has its dtype."""
        if (y := self._again(x)) is not None:
            return y
        if traced(x):
            return one_step(self, x)
        self._check_input(x, (4,), 1)
        return self._run(x, self.spec)


class PackedConvTranspose2d(PackedLayer):
    """(N, C_in, H, W) -> (N, C_out, H', W') of a transposed convolution; see ``PackedLayer``."""

    kind = "conv_transpose"

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x: (N, C_in, H, W); ``output_size`` = (H', W') picks among the sizes that the stride allows, as in torch."""
        if output_size is None and (y := self._again(x)) is not None:
            return y
        if traced(x):
            return one_step(self, x, output_size=output_size)
        self._check_input(x, (4,), 1)
        if output_size is None:
            return self._run(x, self.spec)
        wanted = list(output_size)[-2:]
        least = replace(self.spec, output_padding=(0, 0)).output_size(x.shape[2], x.shape[3])
        extra = (wanted[0] - least[0], wanted[1] - least[1])
        if not all(0 <= e < max(s, d) for e, s, d in zip(extra, self.spec.stride, self.spec.dilation)):
            raise ConfigError(
                f"output_size={wanted} is not reachable from {tuple(x.shape[2:])}; the least is {list(least)}"
            )
        return self._run(x, replace(self.spec, output_padding=extra))


class PackedLinear(PackedLayer):
    """(N, ..., C_in) -> (N, ..., C_out); the statistics run over all tokens of a sample; see ``PackedLayer``."""

    kind = "linear"

    @property
    def in_features(self) -> int:
        """C_in."""
        return self.spec.in_channels

    @property
    def out_features(self) -> int:
        """C_out."""
        return self.spec.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, tokens..., C_in); the result has its dtype."""
        if (y := self._again(x)) is not None:
            return y
        if traced(x):
            return one_step(self, x)
        self._check_input(x, tuple(range(2, 9)), -1)
        if not torch.compiler.is_compiling() and not x.numel():
            return self._activated(x.new_empty((*x.shape[:-1], self.spec.out_channels)))
        return self._run(reference.tokens(x), self.spec, lambda y: reference.from_tokens(y, x), x)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Path -> packed layer, each once, in ``named_modules`` order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLayer)}
