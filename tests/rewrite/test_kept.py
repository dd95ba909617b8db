"""What a rewrite keeps computes as before, bit for bit."""

from __future__ import annotations

import pytest
import torch
from networks import Net
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import binary_layers


def outputs(model: nn.Module, names: list[str], x: Tensor) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: found.setdefault(name, []).append(out.clone())
        )
        for name in names
    ]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def with_one_layer(model: nn.Module, path: str) -> nn.Module:
    config = bd.BidensifyConfig(rules=(bd.Rule(path, "binarize"), bd.Rule("*", "keep")), activation="keep")
    student = bd.bidensify(model, config)
    assert [name for name, _ in binary_layers(student)] == [path]
    return student


def test_everything_in_front_of_the_one_binary_layer_is_untouched() -> None:
    model = Net()
    student = with_one_layer(model, "up2.conv")
    names = ["stem", "basic", "deep", "up1"]
    x = torch.randn(2, 3, 32, 48)
    before, after = outputs(model, names, x), outputs(student, names, x)
    assert all(torch.equal(a, b) for name in names for a, b in zip(before[name], after[name], strict=True))
    own = dict(student.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in model.named_parameters() if name in own)


@pytest.mark.parametrize(
    ("name", "path", "exact"),
    [
        ("resnet18", "layer4.0.downsample.0", 4),
        ("mobilenetv3_large_100", "blocks.6.0.conv", 4),
        ("hrnet_w18_small", "", 0),
    ],
)
def test_backbones(name: str, path: str, exact: int) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, features_only=True).eval()
    plan = bd.plan(model)
    path = path or plan.binary[-1].path
    student = with_one_layer(model, path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = model(x), student(x)
    same = [torch.equal(a, b) for a, b in zip(expected, got, strict=True)]
    assert sum(same) >= (exact or 1), same
    assert not all(same)
