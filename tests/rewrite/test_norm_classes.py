"""Classes of BatchNorms: which a layer takes over, and which do more than normalise and stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_norms import around
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import RPReLU


class NormReLU(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def replaced_forward() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(8)
    norm.forward = lambda x: x.tanh()  # type: ignore[method-assign]
    return norm


class OnlyNamed(nn.BatchNorm2d):
    """A class of its own that does what a BatchNorm does."""


class Around(nn.Module):
    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        return x + self.chain(x)


@pytest.mark.parametrize("norm", [lambda: NormReLU(8), lambda: Doubled(8), replaced_forward])
def test_a_batchnorm_with_a_forward_of_its_own_stays(norm: Callable[[], nn.BatchNorm2d]) -> None:
    model = around(norm())
    student = bd.bidensify(model)
    assert type(student[2]) is type(model[2])
    assert student.bidensify_plan.layers[1].norm is None
    assert any("has a forward of its own" in note and note.startswith("2:") for note in student.bidensify_plan.notes)
    x = torch.randn(2, 8, 16, 16)
    assert torch.equal(student[2](x), model[2](x))
    assert not torch.allclose(student[2](x), nn.BatchNorm2d(8)(x))


def test_a_batchnorm_of_a_subclass_without_a_forward_is_absorbed() -> None:
    student = bd.bidensify(around(OnlyNamed(8)))
    assert isinstance(student[2], nn.Identity)
    assert not student.bidensify_plan.notes


def test_a_batchnorm_that_drops_values_stays_with_its_dropout() -> None:
    layers = pytest.importorskip("timm.layers")
    model = around(layers.BatchNormAct2d(8, drop_layer=lambda **_: nn.Dropout(0.5)))
    student = bd.bidensify(model)
    assert isinstance(student[2].drop, nn.Dropout)
    assert isinstance(student[2].act, RPReLU)
    assert any("2: " in note and "drops values (Dropout)" in note for note in student.bidensify_plan.notes)
    assert isinstance(bd.bidensify(around(layers.BatchNormAct2d(8)))[2], nn.Identity)


def test_a_chain_with_a_norms_own_relu_does_not_carry_the_signal() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), NormReLU(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    student = bd.bidensify(nn.Sequential(nn.Conv2d(3, 8, 3), Around(chain), nn.Conv2d(8, 2, 1)))
    assert student[1].chain[2].bypass is None
    assert not student.bidensify_plan.blocks
