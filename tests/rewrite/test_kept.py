"""What a rewrite keeps computes as before, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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


class Outside(nn.Module):
    """A layer whose parameters the network computes with by itself: how, ``use`` says."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.twin = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        if use == "tied":
            self.twin.weight = self.conv.weight
        elif use == "hooked":
            nn.utils.weight_norm(self.conv)
        elif use == "parametrized":
            nn.utils.parametrizations.weight_norm(self.conv)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.conv(x))
        weight, bias = self.conv.weight, self.conv.bias
        if self.use == "sum":
            y = y - 0.7 * F.conv2d(x, weight.sum((2, 3), keepdim=True))
        elif self.use in ("decoder", "hooked", "parametrized"):
            y = F.conv_transpose2d(y, weight, padding=1)
        elif self.use == "tied":
            y = self.twin(y) + F.conv2d(x, weight, padding=1)
        elif self.use == "bias":
            y = y + bias[:, None, None]
        elif self.use == "shape":
            y = y.to(weight.dtype).to(weight).type_as(weight) + weight.new_zeros(8, 1, 1)
            y = y + torch.zeros_like(bias)[:, None, None]
            weight.sum()
        return self.head(self.other(y))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("use", ["sum", "decoder", "hooked", "parametrized", "tied", "bias"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_layer_whose_parameters_are_used_elsewhere_stays(use: str, forced: bool) -> None:
    torch.manual_seed(0)
    rules = [bd.Rule("conv", "binarize")] if forced else []
    student = bd.bidensify(Outside(use), bd.BidensifyConfig(rules=rules))
    layers = {layer.path: layer for layer in student.bidensify_plan.layers}
    kept = ["conv", "twin"] if use == "tied" else ["conv"]
    for path in kept:
        assert layers[path].action == "keep"
        what = "bias" if use == "bias" else "weight"
        assert f"computes with its {what} outside its own call" in layers[path].reason
    assert layers["other"].action == "binary"
    x = torch.randn(2, 3, 8, 8)
    bd.calibrate(student, [x])
    student.eval()
    with torch.no_grad():
        torch.testing.assert_close(bd.pack(student, kernel="reference")(x), student(x), atol=1e-4, rtol=1e-4)


def test_a_layer_of_which_shape_and_type_alone_are_read_becomes_binary() -> None:
    layers = {layer.path: layer for layer in bd.plan(Outside("shape")).layers}
    assert layers["conv"].action == "binary"
