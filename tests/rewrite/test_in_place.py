"""Activations in place: code that goes on reading what they write into keeps them; nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import RPReLU, set_binarization
from bidensify.rewrite.record import recorder

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STAYS = "stays as it is: the code around it reads what it writes in place, not what it gives"


class Unit(nn.Module):
    """MiDaS' residual unit: the shortcut adds what the first activation wrote into the unit's own input."""

    def __init__(self, activation: nn.Module, style: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act, self.style = activation, style
        self.rest = nn.Sequential(activation, nn.Identity())

    def first(self, x: Tensor) -> Tensor:
        if self.style == "keyword":
            return F.relu(x, inplace=True)
        if self.style == "by place":
            return F.relu(x, True)
        if self.style == "function":
            return torch.relu_(x)
        if self.style == "method":
            return x.relu_()
        if self.style == "sequential":
            y: Tensor = self.rest(x)
            return y
        if self.style == "statement":
            self.act(x)
            return x
        return self.act(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(self.first(x)))
        y = self.norm2(self.conv2(self.act(y) if self.style == "shared" else y))
        return y + x


def network(*units: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), *units, nn.Conv2d(8, 2, 1)).eval()


def check_equal(model: nn.Module) -> nn.Module:
    """With float weights and inputs in the teacher's frame a student gives what the network gives."""
    student = bd.bidensify(model, bd.BidensifyConfig(frame="teacher")).eval()
    set_binarization(student, activations=False, weights=False)
    with torch.no_grad():
        torch.testing.assert_close(student(X.clone()), model(X.clone()))
    return student


STYLES = ("module", "shared", "sequential", "statement", "keyword", "by place", "function", "method")


@pytest.mark.parametrize("style", STYLES)
def test_an_input_that_is_read_again_keeps_its_activation(style: str) -> None:
    torch.manual_seed(0)
    model = network(Unit(nn.ReLU(inplace=True), style), Unit(nn.ReLU(inplace=True), style))
    student = check_equal(model)
    assert [note for note in student.bidensify_plan.notes if STAYS in note or "could not be edited" in note]
    seen: list[Tensor] = []
    student[2].conv1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    student(X)
    assert seen[0].min() == 0


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LeakyReLU(0.1, True), lambda: nn.SiLU(True), lambda: nn.ELU(inplace=True), lambda: nn.ReLU6(True)],
)
def test_other_activations_in_place_are_kept_too(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = network(Unit(make(), "module"))
    student = bd.bidensify(model).eval()
    assert type(student[2].act) is type(model[2].act)
    assert any(STAYS in note for note in student.bidensify_plan.notes)


@pytest.mark.parametrize("style", STYLES)
def test_a_run_on_fake_tensors_says_the_same(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(Unit(nn.ReLU(inplace=True), style))
    real = bd.plan(model, example_inputs=X)
    monkeypatch.setattr(recorder, "_LIGHT_PIXELS", 0)
    assert recorder.record(model, X).fake
    assert bd.plan(model, example_inputs=X).to_dict() == real.to_dict()


@pytest.mark.parametrize("inplace", [True, False])
def test_an_input_that_nobody_reads_again_has_its_activation_exchanged(inplace: bool) -> None:
    class Plain(Unit):
        def forward(self, x: Tensor) -> Tensor:
            size = x.shape
            x = self.act(x)
            y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
            return (y + x).reshape(size)

    student = bd.bidensify(network(Plain(nn.ReLU(inplace), "module")))
    assert isinstance(student[2].act, RPReLU)
    assert not student.bidensify_plan.notes


def test_a_shape_alone_is_no_reading() -> None:
    class Sized(Unit):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act(x)
            y = self.norm2(self.conv2(self.norm1(self.conv1(y))))
            return F.interpolate(y, x.shape[2:])

    student = bd.bidensify(network(Sized(nn.ReLU(True), "module")))
    assert isinstance(student[2].act, RPReLU)
    assert not student.bidensify_plan.notes
