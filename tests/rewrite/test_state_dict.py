"""A full-precision state_dict loaded into a rewritten network gives what the rewrite of a network with those values gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import Net
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bidensify as bd
from bidensify.rewrite import Plan, apply_plan


class Scaled(nn.Module):
    """x + gamma * bn(conv(x)), and a layer whose gamma meets no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.gamma = nn.Parameter(torch.full((1, 16, 1, 1), 1e-6))
        self.d = nn.Conv2d(16, 16, 3, padding=1)
        self.delta = nn.Parameter(torch.full((16, 1, 1), 1e-6))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.gamma * self.bn(self.c(x))
        x = x + self.delta * self.d(x)
        return self.head(x)  # type: ignore[no-any-return]


def row(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *layers, nn.ReLU(), nn.Conv2d(8, 2, 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "layer scale": Scaled,
    "no norm": lambda: row(nn.Conv2d(8, 8, 3, padding=1)),
    "transposed": lambda: row(nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2)),
    "weight norm": lambda: row(parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))),
    "hooked": lambda: row(torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1))),
}


def trained(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = NETWORKS[name]()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) * 3 - (0 if value.dim() == 1 else 1.5))
    return model


def same_state(a: nn.Module, b: nn.Module) -> None:
    other = b.state_dict()
    assert list(a.state_dict()) == list(other)
    for key, value in a.state_dict().items():
        assert torch.equal(value, other[key]), key


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("method", ["bidense", "recu", "react"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_original_equals_the_rewrite_of_a_network_with_its_values(name: str, method: str) -> None:
    source = trained(name)
    direct = bd.bidensify(source, method=method)
    torch.manual_seed(2)
    late = bd.bidensify(NETWORKS[name](), method=method)
    state = source.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    late.load_state_dict(state)
    same_state(late, direct)
    assert list(state) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_a_part_of_a_larger_network_and_one_on_the_meta_device_take_an_original_too() -> None:
    source = trained("layer scale")
    direct = bd.bidensify(source)
    whole = nn.ModuleDict({"inner": bd.bidensify(Scaled())})
    whole.load_state_dict({f"inner.{key}": value for key, value in source.state_dict().items()})
    same_state(whole["inner"], direct)
    with torch.device("meta"):
        student = apply_plan(Scaled(), Plan.from_dict(direct.bidensify_plan.to_dict()))
    own = {key: value for key, value in bd.bidensify(Scaled()).state_dict().items() if "binarizer" in key}
    student.load_state_dict(source.state_dict(), strict=False, assign=True)
    assert own
    assert torch.equal(student.c.norm.weight, direct.c.norm.weight)
    assert torch.equal(student.d.norm.bias, direct.d.norm.bias)


def test_weights_without_a_sign_are_drawn() -> None:
    source = row(nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        source[2].weight[3] = 0
    late = bd.bidensify(row(nn.Conv2d(8, 8, 3, padding=1)))
    late.load_state_dict(source.state_dict())
    same_state(late, bd.bidensify(source))
    assert not source[2].weight[3].any()


def test_a_network_that_is_one_layer() -> None:
    config = bd.BidensifyConfig(rules=[bd.Rule("*", "binarize")])
    torch.manual_seed(0)
    source = nn.Conv2d(4, 6, 3)
    late, direct = (bd.bidensify(layer, config, example_inputs=torch.randn(1, 4, 8, 8))
                    for layer in (nn.Conv2d(4, 6, 3), source))  # fmt: skip
    assert not late.load_state_dict(source.state_dict()).unexpected_keys
    same_state(late, direct)
    assert torch.equal(late.norm.bias, source.bias)


def test_a_students_own_state_loads_as_it_is() -> None:
    student, other = bd.bidensify(trained("layer scale")), bd.bidensify(Scaled())
    with torch.no_grad():
        for value in student.state_dict().values():
            value.copy_(torch.rand_like(value.double()))
    student.c.latent_weight.data[2] = 0
    other.load_state_dict(student.state_dict())
    same_state(other, student)


@pytest.mark.parametrize("gone", ["gamma", "bn.weight", "c.weight", "delta", "d.bias"])
def test_what_an_original_lacks_is_missing_and_nothing_is_made_of_the_rest(gone: str) -> None:
    student = bd.bidensify(Scaled())
    layer = student.c if gone in ("gamma", "bn.weight", "c.weight") else student.d
    before = copy.deepcopy(layer.norm.state_dict())
    state = {key: value for key, value in trained("layer scale").state_dict().items() if key != gone}
    with pytest.raises(RuntimeError, match=f'Missing key.*"{gone}"'):
        student.load_state_dict(state)
    assert student.load_state_dict(state, strict=False).missing_keys == [gone]
    for name in ("weight", "bias"):
        assert torch.equal(getattr(layer.norm, name), before[name]), name


def test_a_layer_scale_of_another_size_is_refused() -> None:
    state = trained("layer scale").state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for gamma: shape \(5,\).*16 values"):
        bd.bidensify(Scaled()).load_state_dict({**state, "gamma": torch.ones(5)})
