"""What is hooked or overridden is called: declarations and kernels stand for parts that nobody listens to, as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import PackError
from bidensify.methods import LayerParts, LayerSpec
from bidensify.nn import BiDenseConv2d, Bypass, SignBinarizer, WeightBinarizer


def both(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output with gradients and without."""
    wanted = layer(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        return wanted, layer(x)


@pytest.mark.parametrize("part", ["binarizer", "weight_binarizer", "norm", "bypass", "activation"])
def test_hooks_on_parts_are_called_with_and_without_gradients(part: str) -> None:
    torch.manual_seed(0)
    layer = BiDenseConv2d(8, 8, 3, padding=1).eval()
    x = torch.randn(2, 8, 6, 7)
    plain = layer(x).detach()
    layer.get_submodule(part).register_forward_hook(lambda module, args, output: 3 * output)
    wanted, got = both(layer, x)
    assert float((wanted - plain).abs().max()) > 0.1
    torch.testing.assert_close(got, wanted)


def test_a_hook_on_the_binarizer_is_called_where_training_counts_bits() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 16, 3, padding=1), nn.Hardtanh(), nn.Conv2d(16, 2, 1)
    )
    student = bd.bidensify(net, method="bnn", example_inputs=torch.randn(1, 3, 8, 8)).to(
        memory_format=torch.channels_last
    )
    layer: Any = student[1].train()
    layer.norm = None
    layer.activation = nn.Identity()
    layer.binarizer.register_forward_hook(lambda module, args, output: 0 * output)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    bias = layer.bias
    assert torch.equal(layer(x), torch.zeros(2, 16, 8, 8) if bias is None else bias.view(-1, 1, 1).expand(2, 16, 8, 8))


class Weighed(SignBinarizer):
    """Multiplies the layer's output by the sample's mean magnitude."""

    def weigh(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        return y * x.abs().mean((1, 2, 3), keepdim=True)


class Lifted(SignBinarizer):
    """A threshold of its own, of which it says nothing else."""

    def _threshold(self, x: Tensor) -> Tensor:
        return x.new_full((), 0.7)


def layer_of(binarizer: SignBinarizer) -> BiDenseConv2d:
    layer = BiDenseConv2d(8, 8, 3, padding=1)
    layer.binarizer = binarizer
    return layer.eval()


def test_a_weigh_of_ones_own_is_used_and_not_packed() -> None:
    torch.manual_seed(0)
    layer = layer_of(Weighed(8))
    wanted, got = both(layer, 3 * torch.randn(2, 8, 6, 7))
    torch.testing.assert_close(got, wanted)
    with pytest.raises(PackError, match="Weighed weighs the layer's output by what it finds in the input"):
        bd.pack(nn.Sequential(layer))


def test_a_threshold_of_ones_own_is_used_and_packed() -> None:
    torch.manual_seed(0)
    layer = layer_of(Lifted(8))
    x = torch.randn(2, 8, 6, 7)
    wanted, got = both(layer, x)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert torch.equal(bd.pack(nn.Sequential(layer))(x), got)


class Doubled(Bypass):
    """Hands on twice the signal."""

    def after_fusion_down(self, x: Tensor, size: Any) -> Tensor:
        return 2 * super().after_fusion_down(x, size)


def test_a_bypass_of_ones_own_is_used() -> None:
    torch.manual_seed(0)
    layer = BiDenseConv2d(8, 8, 3, padding=1).eval()
    layer.bypass = Doubled(8, 8, 3, 1, 1)
    wanted, got = both(layer, torch.randn(2, 8, 6, 7))
    torch.testing.assert_close(got, wanted)


def test_a_method_that_weighs_trains_and_evaluates_alike() -> None:
    @bd.register_method("weighs-in-a-test")
    def method(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        weights = WeightBinarizer(transposed=spec.transposed, groups=spec.groups)
        return LayerParts(Weighed(spec.in_channels, spec.dim), weights)

    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 1))
    student = bd.bidensify(net, method="weighs-in-a-test", example_inputs=torch.randn(1, 3, 8, 8)).eval()
    wanted, got = both(student, 3 * torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(got, wanted)
