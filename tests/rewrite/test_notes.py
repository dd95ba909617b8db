"""What a plan says before training: lone values, merged branches, why nothing would change; and what a size alone decides."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import PlanError


class Pyramid(nn.Module):
    """One head for all levels, the last of which is one pixel at 64×64."""

    def __init__(self, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(5)
        )
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.Identity() if norm is None else norm(8), nn.ReLU())
        self.out = nn.Conv2d(8, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, outs = self.stem(x), []
        for down in self.down:
            x = down(x)
            outs.append(self.out(self.head(x)))
        return outs


def decided(plan: Any) -> dict[str, str]:
    return {layer.path: layer.action for layer in plan.layers}


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_one_call_on_one_pixel_does_not_keep_a_shared_head(norm: type[nn.Module] | None) -> None:
    model = Pyramid(norm)
    small, large = (bd.plan(model, example_inputs=torch.randn(2, 3, side, side)) for side in (64, 128))
    assert decided(small) == decided(large)
    assert decided(small)["head.0"] == "binary"
    lone = [note for note in small.notes if "gives one value per channel and image at this size" in note]
    assert [note.partition(":")[0] for note in lone] == (["head.0"] if norm is None else [])
    assert not any("one value" in note for note in large.notes)


def test_where_every_image_gives_one_value_the_layer_stays() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 4, 4), nn.ReLU(), nn.ConvTranspose2d(8, 8, 4, 4), nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    x = torch.randn(1, 3, 4, 4)
    student = bd.bidensify(model, example_inputs=x)
    layers = {layer.path: layer for layer in student.bidensify_plan.layers}
    assert layers["2"].reason == "gives a 1×1 map, of which a new BatchNorm would see one value per image"
    assert layers["4"].action == "binary"
    student.train()(x).sum().backward()
    assert decided(bd.plan(model, example_inputs=torch.randn(1, 3, 8, 8)))["2"] == "binary"


class Strided(nn.Module):
    """Half the size with every stage, by a convolution, a pooling, slices or patches, and a branch that is pooled whole."""

    def __init__(self, down: str) -> None:
        super().__init__()
        make = {
            "conv": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)),
            "pool": lambda: nn.MaxPool2d(3, 2, 1),
            "slice": nn.Identity,
            "patch": lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8)),
        }[down]
        self.slice = down == "slice"
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(make(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4)
        )
        self.pool, self.pooled = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)
        self.window, self.windowed = nn.AvgPool2d(7), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        side = torch.relu(self.pooled(self.pool(x))) + torch.relu(self.windowed(self.window(x[..., :7, :7])))
        side = side + torch.relu(self.pooled(x.mean((2, 3), keepdim=True)))
        for stage in self.stages:
            x = stage(x[..., ::2, ::2] if self.slice else x)
        return self.head(torch.relu(x) + side)


@pytest.mark.parametrize("down", ["conv", "pool", "slice", "patch"])
def test_a_map_is_pooled_by_what_pools_it_not_by_its_size(down: str) -> None:
    model = Strided(down)
    plans = [bd.plan(model, example_inputs=torch.randn(2, 3, side, side)) for side in (16, 32, 64)]
    reasons = [{layer.path: layer.reason for layer in plan.layers if layer.action != "binary"} for plan in plans]
    assert reasons[0] == reasons[1] == reasons[2]
    assert reasons[0]["pooled"] == reasons[0]["windowed"] == "on a pooled 1×1 map"
    assert len(plans[0].binary) == {"conv": 8, "pool": 4, "slice": 4, "patch": 8}[down]


def test_the_default_size_is_no_reason() -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()]
    for _ in range(7):
        layers += [nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 2, 1))
    derived, given = bd.plan(model), bd.plan(model, example_inputs=torch.randn(2, 3, 512, 512))
    assert decided(derived) == decided(given)
    assert any("gives one value per channel and image at this size" in note for note in derived.notes)
    assert not any("one value" in note for note in given.notes)
    small = bd.plan(model, example_inputs=torch.randn(2, 3, 128, 128))
    assert "gives a 1×1 map" in {layer.path: layer.reason for layer in small.layers}["14"]


class Merging(nn.Module):
    """A convolution and its norm that become one, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.c(x)))

    def fuse(self) -> nn.Module:
        fused = nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            fused.weight.copy_(
                self.c.weight * (self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt())[:, None, None, None]
            )
        return nn.Sequential(fused, nn.ReLU())


def test_merging_layers_after_a_rewrite_says_that_it_must_come_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Merging(), nn.Conv2d(8, 2, 1))
    student = bd.bidensify(model)
    assert "1: fuse() can be called before the rewrite alone" in student.bidensify_plan.notes
    for each in (student, copy.deepcopy(student), pickle.loads(pickle.dumps(student)), bd.pack(student)):
        with pytest.raises(PlanError, match=r"1.fuse\(\) merges full-precision layers.*call it before the rewrite"):
            each[1].fuse()
    model[1] = model[1].fuse()
    fused = bd.bidensify(model)
    assert not fused.bidensify_plan.notes
    assert decided(fused.bidensify_plan)["1.0"] == "binary"


@pytest.mark.parametrize(
    ("name", "sized"),
    [
        ("repvit_m0_9", {}),
        ("shvit_s1", {}),
        ("repghostnet_050", {}),
        ("efficientvit_m0", {"img_size": 64}),
        ("levit_128s", {"img_size": 64}),
    ],
)
def test_timms_networks_that_merge(name: str, sized: dict[str, int]) -> None:
    timm = pytest.importorskip("timm")
    from timm.utils import reparameterize_model

    model = timm.create_model(name, num_classes=3, **sized).eval()
    x = torch.randn(2, 3, 64, 64)
    student = bd.bidensify(model, example_inputs=x)
    assert any("can be called before the rewrite alone" in note for note in student.bidensify_plan.notes)
    for each in (student, bd.pack(student)):
        with pytest.raises(PlanError, match="call it before the rewrite"):
            reparameterize_model(each)
    assert bd.bidensify(reparameterize_model(model), example_inputs=x)(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 1)), torch.randn(2, 3, 16),
            r"\(conv1d is out of reach\); it is Conv2d, ConvTranspose2d and Linear layers that can become binary",
        ),
        (
            nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 2, 1)), torch.randn(2, 3, 4, 8, 8),
            r"\(conv3d is out of reach\); it is Conv2d",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), torch.randn(2, 3, 16, 16),
            r"add a rule with action 'binarize', or set keep_first=False, or set keep_last=False",
        ),
        (
            nn.Sequential(nn.Conv3d(3, 8, 3), nn.Flatten(2), nn.Unflatten(2, (12, 6)), nn.Conv2d(8, 2, 1)),
            torch.randn(2, 3, 4, 8, 8), r"\(conv3d is out of reach; prediction layer\); add a rule .*, or set keep_last=False",
        ),
        (
            nn.Sequential(nn.Conv3d(3, 8, 3), nn.Flatten(2), nn.Linear(72, 2)), torch.randn(2, 3, 4, 8, 8),
            r"\(conv3d is out of reach; linear layer on tokens .*\); add a rule .*, or set linear='all'$",
        ),
    ],
)  # fmt: skip
def test_why_nothing_would_change_and_what_to_do(model: nn.Module, example: Tensor, message: str) -> None:
    with pytest.raises(PlanError, match=f"the rewrite would change nothing: .*{message}"):
        bd.plan(model, example_inputs=example)
