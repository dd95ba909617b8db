"""Kinds of modules and functions by class and name, and a network's own ones that a user registers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.nn import RPReLU
from bidensify.rewrite import kinds, register_kind


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    names, classes = {kind: set(known) for kind, known in kinds._NAMES.items()}, dict(kinds._CLASSES)
    yield
    kinds._NAMES.update(names)
    kinds._CLASSES.update(classes)


class SquareReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * torch.relu(x)


class MeanNorm(nn.Module):
    """Somebody's norm, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


class Thinned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0 if not self.training else x * (torch.rand_like(x) > 0.1)


class Net(nn.Module):
    def __init__(self, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.norm, self.act, self.thin = MeanNorm(), SquareReLU(), Thinned()
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.thin(self.a(x)))
        x = x + y
        return self.head(x) if self.tail is None else self.tail(x)


def test_an_activation_of_ones_own_is_exchanged() -> None:
    assert isinstance(bd.bidensify(Net()).act, SquareReLU)
    register_kind("activation", SquareReLU)
    student = bd.bidensify(Net())
    assert isinstance(student.act, RPReLU)
    assert bd.bidensify(Net()).bidensify_plan.to_dict() == student.bidensify_plan.to_dict()


def test_by_name_in_any_case_and_with_what_libraries_put_around_it() -> None:
    register_kind("activation", "squarerelu")
    register_kind("pass", "Thinned")
    student = bd.bidensify(Net())
    # What hands its input through in evaluation does not stand between a layer and its activation's decision.
    assert isinstance(student.act, RPReLU)
    assert kinds.is_activation("FastSquareReLUActivation")
    assert kinds.is_pass(Thinned())


def test_behind_a_norm_of_ones_own_a_layer_is_no_prediction() -> None:
    def reason() -> str:
        plan = bd.plan(Net(tail=nn.Sequential(nn.Conv2d(8, 8, 1), MeanNorm())))
        return next(layer.reason for layer in plan.layers if layer.path == "tail.0")

    assert reason() == "prediction layer"
    register_kind("norm", MeanNorm)
    assert reason() == "default"


@pytest.mark.parametrize(
    ("kind", "what", "message"),
    [
        ("activations", "x", "'activations' must be one of activation, gate, norm, pass"),
        ("norm", "a.b", "'a.b' must be a class of modules, or a name"),
        ("norm", int, "must be a class of modules"),
        ("norm", nn.ReLU(), "must be a class of modules"),
    ],
)
def test_what_is_no_kind_is_refused(kind: str, what: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_kind(kind, what)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "activation", "gate"),
    [
        ("ReLU6", True, False), ("FastGELUActivation", True, False), ("NewGELUActivation", True, False), ("SwishMe", True, False),
        ("HardSwishJitMe", True, False), ("GELUTanh", True, False), ("hardtanh", True, False), ("leaky_relu", True, False),
        ("Sigmoid", False, True), ("hardsigmoid", False, True), ("log_softmax", False, True), ("tanh", False, True),
        ("conv2d", False, False), ("RPReLU", False, False), ("me", False, False),
    ],
)  # fmt: skip
def test_names_that_libraries_use(name: str, activation: bool, gate: bool) -> None:
    assert (kinds.is_activation(name), kinds.is_gate(name)) == (activation, gate)
