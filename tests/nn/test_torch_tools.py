"""torch's own tools on binary and packed networks: tracing, parameters by name, parametrizations, pruning, TorchScript."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.nn import RPReLU, binary_layers

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Padded(nn.Conv2d):
    """A convolution of somebody's own, which torch.fx would trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), Padded(8, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2)
        self.act, self.tokens, self.head = nn.ReLU(), nn.Linear(8, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = self.act(self.stem(x)) + torch.relu(self.b(torch.relu(self.a(self.stem(x)))))[..., ::2, ::2]
        x = self.tokens(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x if scale is None else x * scale)


def states() -> list[Any]:
    student = bd.bidensify(Net().eval())
    assert len(list(binary_layers(student))) == 3
    return [student, bd.pack(bd.bidensify(Net().eval()))]


@pytest.mark.parametrize("state", [0, 1])
def test_networks_are_traced_with_binary_and_packed_layers_as_steps(state: int) -> None:
    model = states()[state]
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert torch.equal(traced(X), model(X))
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    assert {"stem", "a", "b", "act", "tokens", "head"} <= called


def test_a_traced_student_trains_as_it_does_itself() -> None:
    student = states()[0].train()
    traced = torch.fx.symbolic_trace(student)
    traced(X).square().mean().backward()
    grads = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    assert any("binarizer" in name for name in grads)
    student.zero_grad()
    student(X).square().mean().backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, grads[name], atol=1e-6), name


def test_torchvisions_and_timms_feature_extractors() -> None:
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    student = bd.bidensify(torchvision.models.resnet18(weights=None)).eval()
    for model in (student, bd.pack(student)):
        with torch.no_grad():
            features = create_feature_extractor(model, ["layer2", "layer4"])(X)
        assert [tuple(value.shape) for value in features.values()] == [(2, 128, 4, 4), (2, 512, 1, 1)]


def test_activations_are_steps_wherever_they_stand() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), RPReLU(4)))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]


def test_every_name_of_named_parameters_gives_that_parameter() -> None:
    student = states()[0]
    for name, parameter in student.named_parameters():
        assert student.get_parameter(name) is parameter, name
    assert set(student.a.weight.detach().abs().unique().tolist()) != set(
        student.a.latent_weight.abs().unique().tolist()
    )


def test_what_would_exchange_the_weight_is_refused() -> None:
    student = states()[0]
    before = student.a.weight.detach().clone()
    with pytest.raises(ConfigError, match="parametrize before the rewrite"):
        parametrize.register_parametrization(student.a, "weight", nn.Identity())
    with pytest.raises(ConfigError, match="a bit has no zero"):
        prune.l1_unstructured(student.a, "weight", 0.5)
    assert torch.equal(student.a.weight, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("state", [0, 1])
def test_torchscript_is_refused_with_what_to_do(state: int) -> None:
    with pytest.raises(ConfigError, match="use torch.jit.trace, or bidensify.export"):
        torch.jit.script(states()[state])
