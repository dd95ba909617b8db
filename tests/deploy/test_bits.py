"""Bits in and out of words, against plain Python loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bidensify.deploy.bits import bits_from_signs, signs_from_bits, signs_from_tiles, tiles_from_bits
from bidensify.deploy.spec import PackedSpec
from bidensify.errors import FormatError


@st.composite
def specs(draw: st.DrawFn) -> PackedSpec:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    if draw(st.booleans()):
        channels = draw(st.integers(2, 70))
        return PackedSpec("conv", channels, channels, kernel, groups=channels)
    return PackedSpec(
        "conv", groups * draw(st.integers(1, 70)), groups * draw(st.integers(1, 40)), kernel, groups=groups
    )


@settings(max_examples=40, deadline=None)
@given(specs(), st.integers(0, 2**31))
def test_both_forms_give_the_signs_back(spec: PackedSpec, seed: int) -> None:
    signs = torch.randint(0, 2, spec.weight_shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    bits = bits_from_signs(signs)
    assert bits.shape == (-(-spec.bits // 8),)
    assert torch.equal(signs_from_bits(bits, spec), signs)
    tiles = tiles_from_bits(bits, spec)
    assert tiles.shape == spec.tiles_shape
    assert torch.equal(signs_from_tiles(tiles, spec), signs)


def test_bit_order_is_that_of_the_format() -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 0.0, -1.0])
    # Least significant bit first; 0 counts as +1; the last byte is filled with zeros.
    assert bits_from_signs(signs).tolist() == [0b10001101, 0b00000001]


def test_words_hold_channels_in_order() -> None:
    spec = PackedSpec("conv", 33, 2)
    signs = -torch.ones(spec.weight_shape)
    signs[1, 5] = signs[1, 32] = 1
    tiles = tiles_from_bits(bits_from_signs(signs), spec)
    assert tiles.shape == (1, 1, 1, 1, 2, 16)
    assert tiles[0, 0, 0, 0, 0].tolist() == [0, 1 << 5] + [0] * 14
    assert tiles[0, 0, 0, 0, 1].tolist() == [0, 1] + [0] * 14


@settings(max_examples=40, deadline=None)
@given(specs())
def test_a_spec_survives_json_and_integers(spec: PackedSpec) -> None:
    assert PackedSpec.from_dict(spec.to_dict()) == spec
    assert PackedSpec.from_ints(spec.to_ints()) == spec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 0}, "in_channels=0"),
        ({"in_channels": 7, "groups": 2}, "groups=2"),
        ({"out_channels": 7, "groups": 2}, "groups=2"),
        ({"kernel": [3]}, "kernel"),
        ({"kernel": [3, 1 << 20]}, "kernel"),
        ({"stride": [0, 1]}, "stride"),
        ({"stride": [True, 1]}, "stride"),
        ({"kind": "pool"}, "kind"),
        ({"kind": 3}, "kind"),
        ({"colour": 1}, "colour"),
        ({"kind": "linear", "kernel": [3, 3]}, "linear"),
        ({"kind": "linear", "padding": [0, 1, 0, 0]}, "linear"),
        ({"output_padding": [1, 0]}, "output_padding"),
        ({"alpha": True, "levels": True}, "alpha"),
        ({"custom": True, "alpha": True}, "custom"),
        ({"same": True, "padding": [1, 1, 1, 1]}, "same"),
        ({"in_channels": 1 << 20, "out_channels": 1 << 20}, "weights"),
        ({"in_channels": 1 << 20, "kernel": [4, 4]}, "weights"),
    ],
)
def test_impossible_specs_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        PackedSpec.from_dict({"kind": "conv", "in_channels": 8, "out_channels": 8, **change})


def test_a_spec_without_its_channels_is_refused() -> None:
    with pytest.raises(FormatError, match="out_channels"):
        PackedSpec.from_dict({"kind": "conv", "in_channels": 8})
