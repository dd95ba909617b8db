"""An RPReLU starts from the slope of the activation that it replaces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import PlanError
from bidensify.nn import RPReLU, set_binarization
from bidensify.rewrite import Plan, apply_plan


def prelu(channels: int) -> nn.PReLU:
    made = nn.PReLU(channels)
    nn.init.uniform_(made.weight, 0.2, 1.2)
    return made


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leakier": lambda: nn.LeakyReLU(0.4),
    "prelu": lambda: prelu(8),
    "prelu of one": lambda: prelu(1),
}


def network(kind: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    act = ACTIVATIONS[kind]
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act()]
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act()]
    return nn.Sequential(*layers, nn.Conv2d(8, 2, 1))


class Called(nn.Module):
    """The activation is a function, or one module that is called twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.act = prelu(8)
        self.slope = nn.Parameter(torch.linspace(0.1, 0.8, 8))

    def turn(self, x: Tensor) -> Tensor:
        if self.kind == "shared":
            return self.act(x)  # type: ignore[no-any-return]
        return F.prelu(x, self.slope) if self.kind == "prelu" else F.leaky_relu(x, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.turn(self.stem(x))
        return self.head(self.turn(self.nb(self.b(self.turn(self.na(self.a(x)))))))  # type: ignore[no-any-return]


def check_teacher(model: nn.Module) -> None:
    student = bd.bidensify(model, bd.BidensifyConfig(frame="teacher"))
    assert sum(isinstance(part, RPReLU) for part in student.modules()) == 3
    set_binarization(student, activations=False, weights=False)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_with_float_layers_the_teachers_frame_is_the_teacher(kind: str) -> None:
    check_teacher(network(kind))


@pytest.mark.parametrize("kind", ["shared", "prelu", "leaky"])
def test_so_it_is_where_the_code_is_edited(kind: str) -> None:
    torch.manual_seed(0)
    check_teacher(Called(kind))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_slopes_are_what_was_learned_or_the_papers(kind: str) -> None:
    model = network(kind)
    wanted = {name: torch.full((8,), value) for name, value in (("relu", 0.25), ("leaky", 0.25), ("leakier", 0.4))}
    own, paper = bd.bidensify(model), bd.bidensify(model, bd.BidensifyConfig(frame="paper"))
    for place, activation in ((2, own[2]), (5, own[3].activation), (8, own[6].activation)):
        assert isinstance(activation, RPReLU)
        expected = wanted[kind] if kind in wanted else model[place].weight.expand(8)
        assert torch.equal(activation.slope, expected)
        assert torch.isfinite(activation.bias_out).all()
    slopes = [part.slope for part in paper.modules() if isinstance(part, RPReLU)]
    assert len(slopes) == 3
    assert all(bool((slope == 0.25).all()) for slope in slopes)


@pytest.mark.parametrize("model", [*ACTIVATIONS, "shared", "functional"])
def test_a_loaded_original_brings_its_slopes(model: str) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if model in ACTIVATIONS:
            return network(model, seed)
        made = Called("prelu" if model == "functional" else model)
        nn.init.uniform_(made.slope)
        return made

    source = build(1)
    student, direct = bd.bidensify(build(2)), bd.bidensify(source)
    student.load_state_dict(source.state_dict())
    for key, value in direct.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key


@pytest.mark.parametrize("model", [network("prelu"), Called("shared"), Called("prelu")])
def test_a_plan_is_replayed_without_values(model: nn.Module) -> None:
    student = bd.bidensify(model)
    twin = apply_plan(model.to("meta"), student.bidensify_plan)
    assert all(value.is_meta for value in twin.state_dict().values())
    twin.load_state_dict(student.state_dict(), assign=True)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), student.eval()(x))


def test_a_plan_whose_prelu_is_gone_is_of_another_model() -> None:
    plan = bd.plan(network("prelu"))
    with pytest.raises(PlanError, match=r"'5' is no PReLU or parameter"):
        apply_plan(network("relu"), plan)


def test_plans_of_slopes_are_data_and_move_with_their_network() -> None:
    torch.manual_seed(0)
    plan = bd.plan(Called("shared"))
    assert Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()
    moved = plan.moved("inner")
    found = [new.slope_from for block in moved.blocks for new in block.modules.values()]
    found += [layer.slope_from for layer in moved.binary]
    assert "inner.act" in found
    assert not set(found) - {"inner.act", None}
    assert moved.moved("inner", out=True).to_dict() == plan.to_dict()
