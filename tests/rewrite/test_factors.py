"""Activations whose result others are multiplied with stay as they are; features and their gates do not notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import RPReLU, set_binarization

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 5
NOTE = "the activation stays as it is, since others are multiplied with what it gives"


class HandSigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + 3) / 6  # type: ignore[no-any-return]


class Written(nn.Module):
    """An activation as a function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class HandSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = HandSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)  # type: ignore[no-any-return]


class Squeeze(nn.Module):
    """Squeeze-excite, its gate by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), HandSigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x)  # type: ignore[no-any-return]


class LinearAttention(nn.Module):
    def __init__(self, kernel: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.sums, self.kernel = nn.Identity(), kernel

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.kernel(self.q(x)).flatten(2), self.kernel(self.k(x)).flatten(2)
        kv = k @ self.v(x).flatten(2).transpose(1, 2)
        below = self.sums(q.transpose(1, 2) @ k.sum(2, keepdim=True))
        y = (q.transpose(1, 2) @ kv) / (below + 1e-6)
        return x + self.o(y.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def layer(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation)


def network(*parts: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *parts, nn.Conv2d(8, 2, 1)).eval()


SWISHES = {
    "modules": HandSwish,
    "relu6": lambda: Written(lambda x: x * F.relu6(x + 3) / 6),
    "relu6, divided first": lambda: Written(lambda x: x * (F.relu6(x + 3) / 6)),
    "hardtanh": lambda: Written(lambda x: x * F.hardtanh(x + 3, 0, 6) / 6),
    "mish": lambda: Written(lambda x: x * torch.tanh(F.softplus(x))),
}


@pytest.mark.parametrize("kind", SWISHES)
def test_a_swish_by_hand_stays_what_it_is(kind: str) -> None:
    model = network(*(layer(SWISHES[kind]()) for _ in range(3)))
    student = bd.bidensify(model, bd.BidensifyConfig(frame="teacher")).eval()
    assert not any(isinstance(module, RPReLU) for module in student.modules())
    assert len(student.bidensify_plan.notes) == 1
    assert NOTE in student.bidensify_plan.notes[0]
    set_binarization(student, activations=False, weights=False)
    with torch.no_grad():
        torch.testing.assert_close(student(X), model(X))


def test_the_features_that_a_gate_by_hand_weighs_are_exchanged() -> None:
    student = bd.bidensify(network(layer(nn.ReLU()), Squeeze(), layer(nn.ReLU())))
    assert isinstance(student[1][0].activation, RPReLU)
    assert isinstance(student[2].fc[4].relu, nn.ReLU6)
    assert [note for note in student.bidensify_plan.notes if note.endswith(NOTE)]


def test_a_layer_behind_which_a_gate_by_hand_stands_stays() -> None:
    class Spatial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(8, 8, 3, padding=1), HandSigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(self.conv(x))  # type: ignore[no-any-return]

    plan = bd.plan(network(layer(nn.ReLU()), Spatial()))
    assert [item.reason for item in plan.layers if item.path == "2.conv"] == ["gate"]


@pytest.mark.parametrize("kind", ["relu", "elu"])
def test_queries_and_keys_of_linear_attention_stay_positive(kind: str) -> None:
    def kernel(x: Tensor) -> Tensor:
        return F.elu(x) + 1 if kind == "elu" else F.relu(x)

    student = bd.bidensify(
        network(LinearAttention(kernel), layer(nn.ReLU()), LinearAttention(kernel)), example_inputs=X
    )
    assert isinstance(student[2][0].activation, RPReLU)
    least: list[float] = []
    for at in (1, 3):
        student[at].sums.register_forward_hook(lambda module, args, output: least.append(float(output.detach().min())))
    bd.calibrate(student, [X])
    student.eval()(X)
    assert len(least) >= 4
    assert min(least) >= 0
    assert any(note.endswith(NOTE) for note in student.bidensify_plan.notes)


@pytest.mark.parametrize(
    "after",
    [
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
        lambda x: x * 2 / 6,
        lambda x: x * x.norm(dim=(2, 3), keepdim=True),
        lambda x: x * x,
        lambda x: x * x.roll(1, 2),
        lambda x: x + ((x.flatten(2).transpose(1, 2) @ x.roll(1, 2).flatten(2)) / 3).softmax(-1).mean(),
        lambda x: (x.flatten(2).transpose(1, 2) @ x.flatten(2)).softmax(-1).mean((1, 2))[:, None, None, None] * x,
    ],
)
def test_features_that_something_weighs_have_their_activation_exchanged(after: Callable[[Tensor], Tensor]) -> None:
    student = bd.bidensify(network(layer(nn.ReLU()), Written(after), layer(nn.ReLU())), example_inputs=X)
    assert isinstance(student[1][0].activation, RPReLU)
    assert not student.bidensify_plan.notes
