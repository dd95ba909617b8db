"""Packed layers without torch's dispatcher, and their repeated calls."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import settle
from torch import Tensor

from bidensify.deploy import direct
from bidensify.deploy.backends import Backend, available_kernels, register_backend
from bidensify.deploy.freeze import freeze
from bidensify.deploy.layers import PackedLayer
from bidensify.errors import ConfigError
from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear

KERNELS = available_kernels()
pytestmark = pytest.mark.skipif(KERNELS[0] == "reference", reason="no kernels on this machine")


def _rest(packed: PackedLayer) -> tuple[object, ...]:
    return packed.tiles, packed.side, packed._ints, None, None, None


def test_where_nobody_watches_the_dispatcher_is_left_out() -> None:
    layer = settle(BiDenseConv2d(16, 16, 3, padding=1))
    packed = freeze(layer)
    x = torch.randn(1, 16, 9, 8).contiguous(memory_format=torch.channels_last)
    arguments = (x, packed.tiles, packed.side)
    through = torch.ops.bidensify.packed_layer([x], [1], *_rest(packed))
    straight = direct.direct(*arguments, packed.spec, "auto")
    assert straight is not None
    assert torch.equal(straight, through)
    assert direct.direct(x, packed.tiles, packed.side, packed.spec, "reference") is None
    assert direct.direct(x.double(), packed.tiles, packed.side, packed.spec, "auto") is None
    wanting = x.clone().requires_grad_()
    assert direct.direct(wanting, packed.tiles, packed.side, packed.spec, "auto") is None
    with torch.no_grad():
        assert direct.direct(wanting, packed.tiles, packed.side, packed.spec, "auto") is not None


LAYERS = [
    (lambda: BiDenseConv2d(16, 24, 3, 2, 1), (2, 16, 9, 8)),
    (lambda: BiDenseConv2d(48, 48, 3, padding=1, groups=48), (1, 48, 40, 40)),
    (lambda: BiDenseConvTranspose2d(16, 8, 2, 2), (1, 16, 4, 5)),
    (lambda: BiDenseLinear(16, 24), (2, 3, 5, 16)),
]


def _input(shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape)
    return x if shape[-1] == 16 else x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_call_once_more_gives_what_the_operator_gives(make: object, shape: tuple[int, ...]) -> None:
    packed = freeze(settle(make()))  # type: ignore[operator]
    with torch.no_grad():
        packed(_input(shape))
        for _ in range(3):
            x = _input(shape)
            want = torch.ops.bidensify.packed_layer([x], [1], *_rest(packed))
            again = direct.again(x, packed.tiles, packed.side, packed.kernel, packed._repeated)
            assert again is not None
            assert again.stride() == want.stride()
            assert torch.equal(again, want)
            assert torch.equal(packed(x), want)
            if x.dim() == 4 and shape[-1] != 16:
                assert torch.equal(packed(x.contiguous()), want)


def test_other_shapes_and_inputs_are_looked_at_anew() -> None:
    packed = freeze(settle(BiDenseConv2d(16, 16, 3, padding=1)))
    with torch.no_grad():
        for size in (8, 9, 8, 10):
            x = _input((1, 16, size, 7))
            packed(x)
            assert torch.equal(packed(x), torch.ops.bidensify.packed_layer([x], [1], *_rest(packed)))
        with pytest.raises(ConfigError, match="the layer takes 16 channels"):
            packed(_input((1, 15, 8, 7)))
        for size in range(40):
            packed(_input((1, 16, 4, 3 + size)))
        assert len(packed._repeated._calls) <= packed._repeated._MOST


def test_a_layer_whose_tensors_are_others_now_computes_with_them() -> None:
    first, second = (freeze(settle(BiDenseConv2d(16, 16, 3, padding=1))) for _ in range(2))
    x = _input((1, 16, 8, 7))
    with torch.no_grad():
        before, want = first(x), second(x)
        assert torch.equal(first(x), before)
        assert not torch.equal(before, want)
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), want)
        first.side.data = second.side.clone() * 2
        changed = first(x)
        second.side.mul_(2)
        assert torch.equal(changed, second(x))


def test_copies_begin_anew() -> None:
    packed = freeze(settle(BiDenseConv2d(16, 16, 3, padding=1)))
    x = _input((1, 16, 8, 7))
    with torch.no_grad():
        want = packed(x)
        for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert not other._repeated._calls
            packed.side.zero_()
            assert torch.equal(other(x), want)
            packed.side.copy_(other.side)


def test_a_backend_that_is_registered_later_is_asked() -> None:
    packed = freeze(settle(BiDenseConv2d(16, 16, 3, padding=1)))
    x = _input((1, 16, 8, 7))
    asked = []

    def run(x: Tensor, *arguments: object, **more: object) -> Tensor:
        asked.append(tuple(x.shape))
        return torch.zeros(1, 16, 8, 7)

    from bidensify.deploy import backends

    with torch.no_grad():
        packed(x)
        known = dict(backends._BACKENDS)
        try:
            register_backend(Backend("mine", "cpu", lambda: True, run))
            packed(x)
        finally:
            backends._BACKENDS.clear()
            backends._BACKENDS.update(known)
            backends._choose.cache_clear()
        assert asked == [(1, 16, 8, 7)]
        assert packed(x).any()
