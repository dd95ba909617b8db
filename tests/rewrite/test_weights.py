"""Weights without a sign: layers of zeros start so that they learn, at next to nothing, and the plan says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bidensify as bd
from bidensify.nn import BiDenseConv2d
from bidensify.rewrite.weights import zero_channels

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(8, 2, 1))


class Halved(nn.Conv2d):
    """Makes the weight that it convolves with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight * 0.5, self.bias, padding=1)


LAYERS = {
    "made": lambda: Halved(8, 8, 3, padding=1),
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 2, 2),
    "grouped transposed": lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=2),
}


@pytest.mark.parametrize("method", ["bidense", "bnn"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_of_zeros_learns_and_begins_at_next_to_nothing(kind: str, method: str) -> None:
    layer = LAYERS[kind]()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    student = bd.bidensify(network(layer), method=method).train()
    assert any(
        note
        == "2: has output channels that zeros alone feed, which have no sign and would never learn: their weights are drawn"
        for note in student.bidensify_plan.notes
    )
    bare = student[2].norm(student[2].conv_only(torch.ones(2, 8, 16, 16).sign()))
    assert bare.abs().max() < 0.05
    student(X).square().mean().backward()
    assert (student[2].latent_weight.grad.abs().sum() > 0).item()
    assert not bool((student[2].latent_weight == 0).any())


@pytest.mark.parametrize("method", ["bidense", "bnn", "react"])
def test_branches_that_begin_at_nothing_learn(method: str) -> None:
    class Adapted(nn.Module):
        """LoRA: a layer, and two more beside it whose last begins at zeros; and a residual branch whose norm does."""

        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 8, 1, bias=False)
            self.c, self.n = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            nn.init.zeros_(self.b.weight)
            nn.init.zeros_(self.n.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.w(x) + self.b(self.a(x))
            return torch.relu(x + self.n(self.c(torch.relu(x))))

    torch.manual_seed(0)
    student = bd.bidensify(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Adapted(), nn.Conv2d(8, 2, 1)), method=method
    ).train()
    assert [note.partition(":")[0] for note in student.bidensify_plan.notes if "zeros alone" in note] == ["2.b"]
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        student(X).square().mean().backward()
        optimizer.step()
    for name in ("2.b.weight", "2.c.weight", "2.w.weight"):
        assert not torch.equal(student.get_parameter(name), before[name]), name


def test_channels_with_weights_keep_them_bit_for_bit() -> None:
    layer = LAYERS["grouped transposed"]()
    # Output channels 1 of the first group and 0 of the second.
    with torch.no_grad():
        layer.weight[:4, 1] = 0
        layer.weight[4:, 0] = 0
    assert zero_channels(layer).tolist() == [False, True, False, False, True, False, False, False]
    model = network(layer)
    student = bd.bidensify(model)
    kept = layer.weight != 0
    assert torch.equal(student[2].latent_weight[kept], layer.weight[kept])
    assert (student[2].latent_weight[~kept] != 0).all()
    # The original is left as it was, and so is every other draw.
    assert (layer.weight[~kept] == 0).all()
    whole = bd.bidensify(network(LAYERS["grouped transposed"]()))
    assert torch.equal(whole[2].binarizer.k, student[2].binarizer.k)


def test_the_same_every_time_and_on_the_meta_device() -> None:
    layer = LAYERS["conv"]()
    nn.init.zeros_(layer.weight)
    model = network(layer)
    first, second = bd.bidensify(model), bd.bidensify(copy.deepcopy(model))
    assert torch.equal(first[2].latent_weight, second[2].latent_weight)
    replayed = bd.rewrite.apply_plan(copy.deepcopy(model).to("meta"), first.bidensify_plan)
    assert list(replayed.state_dict()) == list(first.state_dict())
    assert zero_channels(replayed[2]) is None


def test_a_layer_with_weights_is_not_mentioned() -> None:
    assert bd.plan(network(LAYERS["conv"]())).notes == []
    assert isinstance(BiDenseConv2d(3, 4, 1), nn.Conv2d)


def test_a_kept_layer_that_shares_a_weight_of_zeros_computes_what_it_did() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twin = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.twin.weight = self.stem.weight
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.twin(torch.relu(self.stem(x)))))

    torch.manual_seed(0)
    model = Tied()
    with torch.no_grad():
        model.stem.weight[0] = 0
    x = torch.randn(1, 8, 16, 16)
    student = bd.bidensify(model, example_inputs=x)
    assert torch.equal(student.stem(x), model.stem(x))
