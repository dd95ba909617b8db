"""The scale check's two originals, and the starts that the table of starts compares."""

from __future__ import annotations

import torch
from starts import STARTS, started
from torch import nn
from zoo.stages import levelled

import bidensify as bd
from bidensify.nn import RPReLU, binary_layers


def network() -> nn.Sequential:
    """Layers of every kind without a norm, and one with."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, groups=4),
        nn.ConvTranspose2d(64, 64, 4, 4, groups=2), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.Conv2d(32, 64, 1),
        nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 2, 1),
    )  # fmt: skip


def test_a_levelled_layer_keeps_the_power_of_white_inputs() -> None:
    model = network()
    plan = bd.plan(model, example_inputs=torch.randn(1, 3, 16, 16))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    twin = levelled(model, plan)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for path in ("0", "2", "3", "4", "5"):
        layer = twin.get_submodule(path)
        with torch.no_grad():
            layer.bias.zero_()
            y = layer(torch.randn(4, layer.in_channels, 32, 32))[..., 4:-4, 4:-4]
        torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(y.shape[1]), rtol=0.1, atol=0, msg=path)
    assert torch.equal(twin[8].weight, model[8].weight)


def test_the_default_start_is_the_rewrite_itself_and_others_differ() -> None:
    model, x = network().eval(), torch.randn(2, 3, 16, 16)
    student = bd.bidensify(model, example_inputs=x).eval()
    plan = student.bidensify_plan
    own = student.state_dict()
    same = started(student, plan, STARTS["default"]).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in same.items())
    plain = started(student, plan, STARTS["plain"])
    assert all(not m.bias_out.any() for m in plain.modules() if isinstance(m, RPReLU))
    for path, layer in binary_layers(plain):
        # sqrt(2) for a new norm, and each stride's step of a transposed convolution counted again.
        factor = {"2": 2**0.5, "3": 2**0.5 * 4, "4": 2**0.5 * 2, "5": 1.0}[path]
        torch.testing.assert_close(layer.norm.weight, own[f"{path}.norm.weight"] * factor)
