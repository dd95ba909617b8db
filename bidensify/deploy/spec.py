"""What a packed layer is, as plain data: geometry, which side parameters it holds, and their order in one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from bidensify.errors import FormatError

__all__ = ["KINDS", "PackedSpec"]

KINDS = ("conv", "conv_transpose", "linear")
_LARGEST = 1 << 20
# 2^24: beyond it a float32 sum of integers (-3 to 3 with two planes) is no longer exact, and no side could be trusted.
_LONGEST_SUM = 1 << 24
# Fields that the first release did not have, all at the end.
_LATER = ("offset", "rise", "clamp", "bypass_last", "planes")


@dataclass(frozen=True)
class PackedSpec:
    """Geometry and contents of a packed layer.

    Args:
        kind: "conv", "conv_transpose" or "linear" (a linear layer is a 1x1 convolution over (N, tokens, 1, C)).
        in_channels, out_channels: C_in and C_out.
        kernel: (kh, kw).
        stride: (sh, sw).
        padding: (top, left, bottom, right), in pixels.
        dilation: (dh, dw).
        groups: must divide both channel counts.
        output_padding: (h, w) of a transposed convolution, else (0, 0).
        same: padding is computed from the input's size so that H' = ceil(H / stride) (TensorFlow's "SAME").
        mean_threshold: the threshold is k * mean(x) + b, else b alone (or 0).
        shift: b is stored.
        alpha: the scale exp(a * (mean|x - threshold| - 1)) with one a is stored.
        levels: the two activation values (low, high) are stored; without ``alpha`` and ``levels`` they are -1, +1.
        custom: thresholds and levels come from the method's own binarizer module, not from this list.
        bypass: the channel-adaptive bypass is added.
        bypass_padding: (h, w) as the bypass sees it.
        slope, post: the activation's slope on its negative side and its last shift are stored.
        offset: the weights' offset per output channel is stored.
        rise: the activation's slope on its positive side is stored.
        clamp: the activation's two bounds are stored.
        bypass_last: the bypass joins behind the activation.
        planes: bit planes of the activations, 1 or 2. With two, ``alpha`` is the step 1.248 * exp(a) * mean|x - threshold|.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    output_padding: tuple[int, int] = (0, 0)
    same: bool = False
    mean_threshold: bool = False
    shift: bool = False
    alpha: bool = False
    levels: bool = False
    custom: bool = False
    bypass: bool = False
    bypass_padding: tuple[int, int] = (0, 0)
    slope: bool = False
    post: bool = False
    offset: bool = False
    rise: bool = False
    clamp: bool = False
    bypass_last: bool = False
    planes: int = 1

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:
        # Specs are looked up at every call of a layer.
        return self._hash

    @cached_property
    def depthwise(self) -> bool:
        """One input and one output channel per group: the words run across channels instead of within a tap."""
        return self.kind == "conv" and self.groups == self.in_channels == self.out_channels and self.groups > 1

    @cached_property
    def bits(self) -> int:
        """Number of weights."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]

    @cached_property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(C_out, C_in / groups, kh, kw) of the gathered convolution; transposed weights are turned to it too."""
        return (self.out_channels, self.in_channels // self.groups, self.kernel[0], self.kernel[1])

    @cached_property
    def words(self) -> int:
        """32-bit words per pixel and group."""
        return -(-(self.in_channels // self.groups) // 32)

    @cached_property
    def tiles_shape(self) -> tuple[int, ...]:
        """Shape of the weight words as kernels read them.

        (groups, tiles, kh, kw, words, 16): 16 output channels per tile, one 32-bit lane each; depthwise: (kh, kw, words of
        32 channels).
        """
        if self.depthwise:
            return (self.kernel[0], self.kernel[1], -(-self.in_channels // 32))
        tiles = -(-(self.out_channels // self.groups) // 16)
        return (self.groups, tiles, self.kernel[0], self.kernel[1], self.words, 16)

    @cached_property
    def layout(self) -> dict[str, tuple[int, int]]:
        """Name -> (start, length) of each parameter in the side vector."""
        parts = [
            ("k", self.in_channels if self.mean_threshold else 0),
            ("b", self.in_channels if self.shift else 0),
            ("a", 1 if self.alpha else 0),
            ("levels", 2 if self.levels else 0),
            ("scale", self.out_channels),
            ("bias", self.out_channels),
            ("slope", self.out_channels if self.slope else 0),
            ("post", self.out_channels if self.post else 0),
            ("offset", self.out_channels if self.offset else 0),
            ("rise", self.out_channels if self.rise else 0),
            ("clamp", 2 if self.clamp else 0),
        ]
        table, start = {}, 0
        for name, length in parts:
            if length:
                table[name] = (start, length)
                start += length
        return table

    @cached_property
    def side_length(self) -> int:
        """Number of float32 side parameters."""
        return sum(length for _, length in self.layout.values())

    def pads(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) for an input of this size; nothing negative is divided, which ONNX rounds otherwise."""
        if not self.same:
            return self.padding
        result = []
        for axis, size in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            total = max((size - 1) // self.stride[axis] * self.stride[axis] + reach - size, 0)
            result.append((total // 2, total - total // 2))
        return (result[0][0], result[1][0], result[0][1], result[1][1])

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H', W') for an input of (H, W)."""
        top, left, bottom, right = self.pads(height, width)
        sizes = []
        for axis, (size, pad) in enumerate(((height, top + bottom), (width, left + right))):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            if self.kind == "conv_transpose":
                sizes.append((size - 1) * self.stride[axis] - pad + reach + self.output_padding[axis])
            else:
                sizes.append((size + pad - reach) // self.stride[axis] + 1)
        return sizes[0], sizes[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; fields at their default are left out."""
        plain = {f.name: f.default for f in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value != plain[key]
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "layer") -> PackedSpec:
        """The inverse of ``to_dict``, with every field checked.

        Raises:
            FormatError: an unknown, missing or out-of-range field; the message names ``where``.
        """
        if not isinstance(data, Mapping):
            raise FormatError(f"{where}: {str(data)[:80]!r} must be an object of layer fields; the file is damaged")
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(str(key) for key in data if key not in known)
        if unknown:
            raise FormatError(f"{where}: unknown fields {unknown}; the file is damaged or of a newer version")
        values: dict[str, Any] = {}
        for name in data:
            default = known[name].default
            values[name] = _field(name, data[name], default, where)
        for name in ("kind", "in_channels", "out_channels"):
            if name not in values:
                raise FormatError(f"{where}: the field {name!r} is missing; the file is damaged")
        spec = cls(**values)
        spec.check(where)
        return spec

    def check(self, where: str = "layer") -> None:
        """Raises FormatError for a combination that no layer has."""
        if self.kind not in KINDS:
            raise FormatError(f"{where}: kind={self.kind!r} must be one of {list(KINDS)}")
        for name in ("in_channels", "out_channels", "groups"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise FormatError(f"{where}: {name}={getattr(self, name)} must be within 1..{_LARGEST}")
        for name, low in (
            ("kernel", 1),
            ("stride", 1),
            ("dilation", 1),
            ("padding", 0),
            ("output_padding", 0),
            ("bypass_padding", 0),
        ):
            value = getattr(self, name)
            if not all(low <= v <= 4096 for v in value):
                raise FormatError(f"{where}: {name}={list(value)} must be within {low}..4096")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise FormatError(
                f"{where}: groups={self.groups} must divide in_channels={self.in_channels} and "
                f"out_channels={self.out_channels}"
            )
        if self.planes not in (1, 2):
            raise FormatError(
                f"{where}: planes={self.planes} bit planes of activations; this bidensify runs 1 or 2: install a newer one"
            )
        if self.bits > 1 << 34 or (self.bits // self.out_channels) * (2 * self.planes - 1) >= _LONGEST_SUM:
            raise FormatError(f"{where}: {self.bits} weights are more than a layer can have")
        if self.custom and (self.mean_threshold or self.shift or self.alpha or self.levels):
            raise FormatError(f"{where}: a custom binarizer cannot have stored thresholds too")
        if self.rise and not self.slope:
            raise FormatError(f"{where}: rise is stored without slope; the file is damaged")
        if self.alpha and self.levels:
            raise FormatError(f"{where}: alpha and levels exclude each other")
        flat = self.kernel == (1, 1) == self.stride == self.dilation and not any(self.padding) and self.groups == 1
        if self.kind == "linear" and not flat:
            raise FormatError(f"{where}: a linear layer has neither kernel, stride, padding, dilation nor groups")
        if self.kind != "conv_transpose" and any(self.output_padding):
            raise FormatError(f"{where}: output_padding belongs to a transposed convolution")
        if self.same and (self.kind != "conv" or any(self.padding)):
            raise FormatError(f"{where}: same padding belongs to a convolution without padding of its own")

    def to_ints(self) -> list[int]:
        """Flat integers, the form in which operators take a spec."""
        flat: list[int] = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "kind":
                flat.append(KINDS.index(value))
            elif isinstance(value, tuple):
                flat.extend(value)
            else:
                flat.append(int(value))
        return flat

    @classmethod
    def from_ints(cls, ints: Sequence[int]) -> PackedSpec:
        """The inverse of ``to_ints``."""
        return _from_ints(tuple(ints))


@lru_cache(maxsize=4096)
def _from_ints(ints: tuple[int, ...]) -> PackedSpec:
    values: dict[str, Any] = {}
    at = 0
    for f in fields(PackedSpec):
        default = f.default
        if at == len(ints) and f.name in _LATER:
            # Written before the field was: a program that holds an older spec runs on.
            break
        if isinstance(default, tuple):
            values[f.name] = ints[at : at + len(default)]
            at += len(default)
            continue
        value = ints[at]
        values[f.name] = KINDS[value] if f.name == "kind" else bool(value) if isinstance(default, bool) else value
        at += 1
    if at != len(ints):
        raise FormatError(f"a layer spec has {at} integers, got {len(ints)}")
    spec = PackedSpec(**values)
    spec.check()
    return spec


def _field(name: str, value: Any, default: Any, where: str) -> Any:
    def integer(v: Any) -> bool:
        return isinstance(v, int) and not isinstance(v, bool)

    if name == "kind":
        good = isinstance(value, str)
    elif isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, tuple):
        good = isinstance(value, list | tuple) and len(value) == len(default) and all(integer(v) for v in value)
        value = tuple(value) if good else value
    else:
        good = integer(value)
    if not good:
        raise FormatError(f"{where}: {name}={str(value)[:80]!r} has the wrong type; the file is damaged")
    return value
