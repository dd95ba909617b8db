"""Bits in and out of words: the stored form (dense, no padding within a layer) and the form that kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from bidensify.deploy.spec import PackedSpec
from bidensify.exact import plus_minus

__all__ = ["bits_from_signs", "signs_from_bits", "signs_from_tiles", "tiles_from_bits"]

_SHIFTS32 = torch.arange(32, dtype=torch.int32)
# Masks in place of shifts: ONNX has no right shift of signed integers.
_MASKS32 = torch.ones(32, dtype=torch.int32) << _SHIFTS32
_masks: dict[torch.device, Tensor] = {}


def bits_from_signs(signs: Tensor) -> Tensor:
    """Packs ``signs >= 0`` into uint8, least significant bit first, in the order of ``signs.flatten()``.

    Args:
        signs: any shape, n elements.

    Returns:
        (ceil(n / 8),) uint8; unused bits of the last byte are 0.
    """
    flat = (signs.detach().flatten() >= 0).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (flat * weights).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, count: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> shifts) & 1).flatten()[:count]


def signs_from_bits(bits: Tensor, spec: PackedSpec) -> Tensor:
    """(C_out, C_in / groups, kh, kw) float32 of -1 and +1 from the stored bytes of a layer."""
    return (_unpack(bits, spec.bits).to(torch.float32) * 2 - 1).view(spec.weight_shape)


def _words(flags: Tensor) -> Tensor:
    """(..., 32) of 0 and 1 -> (...) int32."""
    parts = flags.to(torch.int32) << _SHIFTS32.to(flags.device)
    # The 32 values share no bit, so that the wrapping sum is their union.
    return parts.sum(-1, dtype=torch.int32)


def tiles_from_bits(bits: Tensor, spec: PackedSpec) -> Tensor:
    """The weight words as kernels read them: int32 of ``spec.tiles_shape``; bits outside the layer are 0."""
    flags = _unpack(bits, spec.bits).view(spec.weight_shape)
    out, per_group, kh, kw = spec.weight_shape
    if spec.depthwise:
        flags = torch.nn.functional.pad(flags.view(out, kh, kw).permute(1, 2, 0), (0, -out % 32))
        return _words(flags.reshape(kh, kw, -1, 32)).contiguous()
    groups, tiles, _, _, words, lanes = spec.tiles_shape
    flags = flags.view(groups, out // groups, per_group, kh, kw)
    flags = torch.nn.functional.pad(flags, (0, 0, 0, 0, 0, words * 32 - per_group, 0, tiles * lanes - out // groups))
    flags = flags.view(groups, tiles, lanes, words, 32, kh, kw).permute(0, 1, 5, 6, 3, 2, 4)
    return _words(flags).contiguous()


def _masks32(tiles: Tensor) -> Tensor:
    """``_MASKS32`` where ``tiles`` is. Copied to a device once: a copy at each call would wait for what runs there."""
    if tiles.device.type == "cpu" or type(tiles) is not Tensor:
        return _MASKS32.to(tiles.device)
    if tiles.device not in _masks:
        with torch.inference_mode(False):
            _masks[tiles.device] = _MASKS32.to(tiles.device)
    return _masks[tiles.device]


def signs_from_tiles(tiles: Tensor, spec: PackedSpec) -> Tensor:
    """The inverse of ``tiles_from_bits``: (C_out, C_in / groups, kh, kw) float32 of -1 and +1."""
    flags = (tiles.unsqueeze(-1) & _masks32(tiles)) != 0
    out, per_group, kh, kw = spec.weight_shape
    if spec.depthwise:
        flags = flags.flatten(2)[..., :out].permute(2, 0, 1)
    else:
        groups, count, _, _, words, lanes = spec.tiles_shape
        flags = flags.permute(0, 1, 5, 4, 6, 2, 3).reshape(groups, count * lanes, words * 32, kh, kw)
        flags = flags[:, : out // groups, :per_group]
    return plus_minus(flags).reshape(spec.weight_shape)
