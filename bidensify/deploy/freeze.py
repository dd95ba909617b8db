"""From a latent layer to a packed one: what is folded, what is kept, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bidensify.deploy.bits import bits_from_signs
from bidensify.deploy.layers import PackedConv2d, PackedConvTranspose2d, PackedLayer, PackedLinear
from bidensify.deploy.reference import convolve, tokens
from bidensify.deploy.spec import PackedSpec
from bidensify.errors import ConfigError, FormatError, PackError
from bidensify.exact import check_flips, fold
from bidensify.nn import BinaryLayer, Bypass

__all__ = ["empty_from_meta", "freeze"]

_CLASSES: dict[str, type[PackedLayer]] = {
    "conv": PackedConv2d,
    "conv_transpose": PackedConvTranspose2d,
    "linear": PackedLinear,
}
# Of ``Folded``: what the side vector holds, and which of it a spec names.
_FOLDED = ("scale", "bias", "offset", "rise", "slope", "clamp", "post")
_OPTIONAL = ("levels", *_FOLDED[2:])


def freeze(layer: BinaryLayer, kernel: str = "auto", name: str = "layer") -> PackedLayer:
    """Packs one latent layer's evaluation behaviour.

    Args:
        layer: a binary convolution, transposed convolution or linear layer.
        kernel: see ``pack``.
        name: what errors call the layer.

    Raises:
        PackError: the layer cannot be frozen to bits exactly.
    """
    if not isinstance(layer, BinaryLayer):
        raise PackError(f"{name}: {type(layer).__name__} is not a binary layer; pack models made by bidensify()")
    for part in (layer.binarizer, layer.weight_binarizer):
        if not part.packable:
            raise PackError(
                f"{name}: {part.unpackable_reason or f'{type(part).__name__} says that it is not packable'}"
            )
    if not (layer.binarizer.enabled and layer.binarize_weights):
        raise PackError(
            f"{name}: the layer still computes in float (binarizer.enabled={layer.binarizer.enabled}, "
            f"binarize_weights={layer.binarize_weights}); call set_binarization(model, activations=True, weights=True)"
        )
    if not bool(torch.isfinite(layer.latent_weight).all()):
        raise PackError(f"{name}: its weights are not finite; the model was not trained to a usable state")
    stored, flips = layer.binarizer.stored(), layer.binarizer.flips()
    try:
        signs, scale, offset = layer.binary_weight()
        folded = fold(layer, scale, offset)
        if flips is not None:
            check_flips(layer.binarizer, stored is None or "levels" in stored, offset)
    except ConfigError as error:
        raise PackError(f"{name}: {error}") from error
    spec = _geometry(layer, name)
    signs = _gathered(signs, spec)
    spec = _find_padding(layer, signs, scale, offset, spec, name)
    spec = replace(spec, planes=layer.binarizer.planes, bypass_last=layer.activation_first)
    own: dict[str, nn.Module | None] = {"activation": folded.activation}
    if flips is not None:
        # What turns an input channel round turns the weights' signs that it meets.
        per_group = flips.detach().to(signs).view(spec.groups, 1, -1, 1, 1)
        signs = (signs.view(spec.groups, -1, *spec.weight_shape[1:]) * per_group).view(spec.weight_shape)
    if stored is None:
        spec, own["binarizer"] = replace(spec, custom=True), layer.binarizer
    spec, own["bypass"] = _bypass(layer, spec)
    parts: dict[str, Any] = {**(stored or {}), **{key: getattr(folded, key) for key in _FOLDED}}
    held = {key for key, value in parts.items() if value is not None}
    flags: dict[str, Any] = {key: key in held for key in _OPTIONAL}
    spec = replace(spec, mean_threshold="k" in held, shift="b" in held, alpha="a" in held, **flags)
    try:
        spec.check(name)
    except FormatError as error:
        raise PackError(str(error)) from error
    for key, (_, length) in spec.layout.items():
        if parts[key].numel() != length:
            raise PackError(f"{name}: {key} has {parts[key].numel()} values, the layer needs {length}")
    side = torch.cat([parts[key].detach().to(signs.device).float().flatten() for key in spec.layout])
    if not bool(torch.isfinite(side).all()):
        # An open bound of a clamp is none.
        bad = [key for key in spec.layout if key != "clamp" and not bool(torch.isfinite(parts[key]).all())]
        if bad:
            raise PackError(
                f"{name}: {bad} hold values that are not finite; the model was not trained to a usable state"
            )
    packed = _CLASSES[spec.kind](spec, kernel, signs.device)
    packed.bits.copy_(bits_from_signs(signs))
    packed.side.copy_(side)
    packed.arrange()
    for key, module in own.items():
        setattr(packed, key, None if module is None else _own(module))
    packed.train(layer.training)
    return packed


def empty_from_meta(
    meta: Mapping[str, Any], like: BinaryLayer | None = None, kernel: str = "auto", name: str = "layer"
) -> PackedLayer:
    """An empty layer from the data that ``PackedLayer.meta`` gave, to be filled by ``load_state_dict``.

    Args:
        meta: from JSON.
        like: the latent layer at the same place of the rebuilt model; needed by layers with a module of the method's own (a
            custom binarizer, bypass or activation).
        kernel: see ``pack``.
        name: what errors call the layer.

    Raises:
        FormatError: ``meta`` is damaged, or ``like`` is another layer.
    """
    if not isinstance(meta, Mapping) or "spec" not in meta:
        raise FormatError(f"{name}: the layer's record {str(meta)[:80]!r} has no 'spec'; the file is damaged")
    spec = PackedSpec.from_dict(meta["spec"], name)
    own = meta.get("own", [])
    if not isinstance(own, list) or not all(key in ("binarizer", "bypass", "activation") for key in own):
        raise FormatError(f"{name}: own={str(own)[:80]!r} must list 'binarizer', 'bypass' or 'activation'")
    if like is not None:
        _check_like(like, spec, name)
    place = None if like is None else next(like.parameters()).device
    packed = _CLASSES[spec.kind](spec, kernel, None if place is None or place.type == "meta" else place)
    for key in own:
        module = None if like is None else getattr(like, key)
        if module is None:
            raise FormatError(
                f"{name}: the layer has a {key} of its method's own, which is rebuilt from the base model; give the model"
            )
        setattr(packed, key, _own(module))
    if spec.custom and packed.binarizer is None:
        raise FormatError(f"{name}: a custom binarizer is announced but not listed; the file is damaged")
    return packed


def _check_like(like: BinaryLayer, spec: PackedSpec, name: str) -> None:
    found = _geometry(like, name)
    names = ("kind", "in_channels", "out_channels", "kernel", "stride", "dilation", "groups")
    wrong = [key for key in names if getattr(found, key) != getattr(spec, key)]
    if wrong:
        text = ", ".join(f"{key}: file {getattr(spec, key)!r}, model {getattr(found, key)!r}" for key in wrong)
        raise FormatError(f"{name}: the file is of another architecture ({text}); give the model that was packed")


def _own(module: nn.Module) -> nn.Module:
    """A frozen copy."""
    return copy.deepcopy(module).requires_grad_(False)


def _geometry(layer: nn.Module, name: str) -> PackedSpec:
    """The spec without padding's details, thresholds, bypass and activation."""
    if isinstance(layer, nn.Linear):
        return PackedSpec("linear", layer.in_features, layer.out_features)
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        raise PackError(
            f"{name}: {type(layer).__name__} is neither Conv2d, ConvTranspose2d nor Linear; keep it in float"
        )
    spec = PackedSpec(
        "conv_transpose" if isinstance(layer, nn.ConvTranspose2d) else "conv",
        layer.in_channels,
        layer.out_channels,
        _pair(layer.kernel_size),
        _pair(layer.stride),
        dilation=_pair(layer.dilation),
        groups=layer.groups,
    )
    if layer.padding_mode != "zeros":
        raise PackError(
            f"{name}: padding_mode={layer.padding_mode!r}; packed layers pad with zeros. Keep this layer in float "
            f"(Rule({name!r}, 'keep')) or train it with zero padding"
        )
    if isinstance(layer.padding, str):
        reach = [d * (k - 1) if layer.padding == "same" else 0 for d, k in zip(spec.dilation, spec.kernel, strict=True)]
        return replace(spec, padding=(reach[0] // 2, reach[1] // 2, reach[0] - reach[0] // 2, reach[1] - reach[1] // 2))
    ph, pw = _pair(layer.padding)
    output_padding = _pair(layer.output_padding) if spec.kind == "conv_transpose" else (0, 0)
    return replace(spec, padding=(ph, pw, ph, pw), output_padding=output_padding)


def _pair(value: Any) -> tuple[int, int]:
    pair = tuple(int(v) for v in value) if isinstance(value, tuple | list) else (int(value), int(value))
    return (pair[0], pair[0]) if len(pair) == 1 else cast(tuple[int, int], pair)


def _gathered(signs: Tensor, spec: PackedSpec) -> Tensor:
    """Weights as (C_out, C_in / groups, kh, kw), whichever way the layer holds them."""
    if spec.kind == "conv_transpose":
        per_group = spec.out_channels // spec.groups
        grouped = signs.view(spec.groups, spec.in_channels // spec.groups, per_group, *spec.kernel)
        signs = grouped.transpose(1, 2)
    return signs.reshape(spec.weight_shape)


def _find_padding(
    layer: BinaryLayer, signs: Tensor, scale: Tensor, offset: Tensor | None, spec: PackedSpec, name: str
) -> PackedSpec:
    """The padding with which the bare layer is a convolution (or product) of ±1 values: found by asking the layer itself.

    A layer may be of any subclass (static or dynamic "same" padding, standardised weights, ...): two probes of
    different parity and magnitude tell which of the paddings that packed layers have is its own.
    """
    if signs.device.type == "meta":
        return spec
    candidates = [spec]
    if spec.kind == "conv":
        static = getattr(layer, "static_padding", None)
        pads = getattr(static, "padding", None)
        if isinstance(pads, tuple) and len(pads) == 4:
            left, right, top, bottom = (int(p) for p in pads)
            own = spec.padding
            padding = (own[0] + top, own[1] + left, own[2] + bottom, own[3] + right)
            candidates.append(replace(spec, padding=padding))
        candidates.append(replace(spec, padding=(0, 0, 0, 0), same=True))
    reach = [d * (k - 1) + 1 + s for d, k, s in zip(spec.dilation, spec.kernel, spec.stride, strict=True)]
    generator = torch.Generator().manual_seed(0)

    def per_channel(value: Tensor, like: Tensor) -> Tensor:
        return value.to(like.dtype).view(1, -1, 1, 1)

    for extra, magnitude in ((0, 1), (1, 8)):
        # Twice the padding more: a transposed layer's padding takes from its output.
        size = (1, spec.in_channels, *(r + extra + 2 * max(spec.padding) for r in reach))
        probe = magnitude * (torch.randint(0, 2, size, generator=generator) * 2 - 1).to(signs)
        with torch.no_grad():
            if spec.kind == "linear":
                flat = probe.flatten(2).mT
                probe, got = tokens(flat), tokens(layer.conv_only(flat))
            else:
                got = layer.conv_only(probe)
            bias = getattr(layer, "bias", None)
            got = got if bias is None else got - bias.detach().view(1, -1, 1, 1)
            kept = []
            for candidate in candidates:
                if candidate.output_size(*probe.shape[2:]) != tuple(got.shape[2:]):
                    continue
                want = convolve(probe, signs, candidate)
                want = want * per_channel(scale, want)
                if offset is not None:
                    want = want + convolve(probe, torch.ones_like(signs), candidate) * per_channel(offset, want)
                # Elsewhere a float32 convolution may round its factors (TF32).
                whole = 1e-5 if got.device.type == "cpu" else 1e-3
                tolerance = whole if got.dtype in (torch.float32, torch.float64) else 0.1
                if torch.allclose(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max() + 1e-6)):
                    kept.append(candidate)
        candidates = kept
    if not candidates:
        raise PackError(
            f"{name}: {type(layer).__name__} does not compute "
            f"{'the product with' if spec.kind == 'linear' else 'a zero-padded convolution of'} its binary weights, so its "
            f"popcounts would be wrong; keep it in float (Rule({name!r}, 'keep'))"
        )
    return candidates[0]


def _bypass(layer: BinaryLayer, spec: PackedSpec) -> tuple[PackedSpec, nn.Module | None]:
    bypass = layer.bypass
    if bypass is None:
        return spec, None
    if getattr(type(bypass), "exact", None) is not Bypass.exact:
        return spec, bypass
    same_channels = (bypass.in_channels, bypass.out_channels) == (spec.in_channels, spec.out_channels)
    if same_channels and spec.kind == "linear":
        return replace(spec, bypass=True), None
    geometry = (bypass.kernel_size, bypass.stride, bypass.dilation, bypass.transposed)
    if same_channels and geometry == (spec.kernel, spec.stride, spec.dilation, spec.kind == "conv_transpose"):
        ph, pw = bypass.padding
        return replace(spec, bypass=True, bypass_padding=(ph, pw)), None
    return spec, bypass
