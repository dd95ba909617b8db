"""linear="all": attention and MLP projections; the residual rule, the scale, packing, tied weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_signal import seen_by_layers, silence
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import binary_layers

ALL = bd.BidensifyConfig(linear="all")


def vit(depth: int = 4) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=48, num_heads=3, depth=depth, num_classes=0, global_pool=""
    )
    return model.eval()


def swin(depth: int = 2) -> nn.Module:
    """With stochastic depth, so that adds stay; the windows of every second block are shifted."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=48, depths=(depth, depth), num_heads=(2, 4),
        num_classes=0, global_pool="", drop_path_rate=0.1,
    )  # fmt: skip
    return model.eval()


def dinov2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=64, patch_size=16, mlp_ratio=2
    )
    model: nn.Module = transformers.Dinov2Model(config)
    return model.eval()


class PassNorm(nn.LayerNorm):
    """A LayerNorm that hands its input through: a signal of ones would not survive one."""

    def forward(self, input: Tensor) -> Tensor:
        return input.clone()


@pytest.mark.parametrize(("make", "after"), [(vit, "pos_drop"), (swin, "patch_embed"), (dinov2, "embeddings")])
def test_one_full_precision_signal_reaches_every_projection(make: object, after: str) -> None:
    model = make()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = PassNorm
    student = bd.bidensify(model, ALL)
    silence(student)
    found = seen_by_layers(student, after, torch.randn(1, 3, 64, 64))
    assert len(found) == len(student.bidensify_plan.binary) >= 16
    for path, x in found.items():
        torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=1e-3, msg=path)


@pytest.mark.parametrize(("make", "blocks"), [(vit, "Block"), (swin, "SwinTransformerBlock"), (dinov2, "Dinov2Layer")])
def test_the_untrained_rewrite_keeps_the_scale_and_packs(make: object, blocks: str) -> None:
    model = make()  # type: ignore[operator]
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    student = bd.bidensify(model, ALL)
    bd.calibrate(student, [x])
    student.eval()

    def spreads(network: nn.Module) -> list[float]:
        found: list[float] = []
        hooks = [
            module.register_forward_hook(lambda m, a, out: found.append(out.float().std().item()) or None)
            for module in network.modules()
            if type(module).__name__ == blocks
        ]
        with torch.no_grad():
            network(x)
        for hook in hooks:
            hook.remove()
        return found

    before, after = spreads(model), spreads(student)
    assert len(before) == len(after) == 4
    assert all(1 / 4 < b / a < 4 for a, b in zip(before, after))

    with torch.no_grad():
        latent, packed = student(x), bd.pack(student)(x)
    latent, packed = (out if isinstance(out, Tensor) else out.last_hidden_state for out in (latent, packed))
    torch.testing.assert_close(packed, latent, rtol=1e-3, atol=1e-3)


def test_what_stays_says_why() -> None:
    model = nn.Sequential(vit(), nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 5))
    model(torch.randn(1, 3, 64, 64))
    kept = {layer.path: layer.reason for layer in bd.plan(model, ALL).kept}
    assert kept == {
        "0.patch_embed.proj": "first layer on the image",
        "2": "linear layer on vectors",
        "4": "linear layer on vectors",
    }


class Tied(nn.Module):
    """Two projections of tokens with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(self.embed(x)))))  # type: ignore[no-any-return]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(2, 6, 8)
    student = bd.bidensify(model, ALL, example_inputs=x)
    assert {path for path, _ in binary_layers(student)} == {"first", "second"}
    assert student.first.latent_weight is student.second.latent_weight
    before = student.first.latent_weight.clone()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, student.first.latent_weight)
    assert torch.equal(student.first.latent_weight, student.second.latent_weight)
    student.eval()
    bd.save_pretrained(student, tmp_path)
    again = bd.from_pretrained(tmp_path, model)
    assert torch.equal(again(x), student(x))
    assert again.first.latent_weight is again.second.latent_weight


class PostNorm(nn.Module):
    """Attention and MLP whose norms stand behind them (Swin V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.qkv, self.proj, self.norm1 = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.up, self.down, self.norm2 = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, c).unbind(2)
        x = x + self.norm1(self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v))
        x = x + self.norm2(self.down(torch.relu(self.up(x))))
        return self.head(x)  # type: ignore[no-any-return]


def test_norms_behind_a_blocks_last_layer() -> None:
    """The add stays, since a norm rescales what comes to it, and the last layer has no bypass of its own."""
    torch.manual_seed(0)
    student = bd.bidensify(PostNorm(), ALL, example_inputs=torch.randn(2, 6, 8))
    assert {path: layer.bypass is not None for path, layer in binary_layers(student)} == {
        "qkv": True,
        "proj": False,
        "up": True,
        "down": False,
    }


class Deformable(nn.Module):
    """Attention that samples its values where one projection says and weighs them as another says; no telling names."""

    def __init__(self, heads: int = 2, points: int = 3) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.a, self.b = nn.Linear(16, heads * points * 2), nn.Linear(16, heads * points)
        self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        values = self.c(tokens).transpose(1, 2).reshape(n * self.heads, c // self.heads, h, w)
        grid = torch.stack(torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij"), -1).flip(-1)
        offsets = self.a(tokens).view(n, h * w, self.heads, self.points, 2)
        where = 2 * (grid.reshape(1, h * w, 1, 1, 2) + offsets / torch.tensor([w, h])) - 1
        where = where.transpose(1, 2).flatten(0, 1)
        weights = self.b(tokens).view(n, h * w, self.heads, self.points).softmax(-1)
        weights = weights.transpose(1, 2).reshape(n * self.heads, 1, h * w, self.points)
        seen = (F.grid_sample(values, where, align_corners=False) * weights).sum(-1)
        return self.head(x + self.d(seen.view(n, c, h * w).transpose(1, 2)).transpose(1, 2).view(n, c, h, w))  # type: ignore[no-any-return]


def test_where_to_look_and_how_much_stay_in_full_precision() -> None:
    torch.manual_seed(0)
    plan = bd.plan(Deformable(), ALL, example_inputs=torch.randn(2, 3, 32, 32))
    assert {layer.path: layer.reason for layer in plan.kept} == {
        "stem": "first layer on the image",
        "a": "says where to sample",
        "b": "gate",
        "head": "prediction layer",
    }
    rule = bd.Rule("a", "binarize")
    forced = bd.plan(
        Deformable(), bd.BidensifyConfig(linear="all", rules=[rule]), example_inputs=torch.randn(1, 3, 32, 32)
    )
    assert "a" in {layer.path for layer in forced.binary}


class Offsets(nn.Module):
    """A deformable convolution: a convolution gives its offsets, another the mask."""

    def __init__(self) -> None:
        super().__init__()
        ops = pytest.importorskip("torchvision.ops")
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.offset, self.mask = nn.Conv2d(8, 18, 3, padding=1), nn.Conv2d(8, 9, 3, padding=1)
        self.sample = ops.DeformConv2d(8, 8, 3, padding=1)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.body(self.sample(x, self.offset(x), self.mask(x).sigmoid())))  # type: ignore[no-any-return]


def test_offsets_of_a_deformable_convolution_stay() -> None:
    kept = {layer.path: layer.reason for layer in bd.plan(Offsets(), example_inputs=torch.randn(1, 3, 16, 16)).kept}
    assert kept["offset"] == kept["mask"] == "says where to sample"


class Biased(nn.Module):
    """A position bias that an MLP makes of a table of coordinates (Swin V2): an NHWC map, but none of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.table = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8))
        self.register_buffer("places", torch.rand(1, 16, 16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x) + self.table(self.places).permute(0, 3, 1, 2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("linear", ["pointwise", "all"])
def test_layers_on_constants_stay(linear: str) -> None:
    config = bd.BidensifyConfig(linear=linear)
    plan = bd.plan(Biased(), config, example_inputs=torch.randn(1, 3, 16, 16))
    kept = {layer.path: layer.reason for layer in plan.kept}
    assert kept["table.0"] == kept["table.2"] == "on constants alone, such as a table of positions"
    assert {layer.path for layer in plan.binary} == {"body"}


class Shaped(nn.Module):
    """A block whose code asks for a shape: a call of the builtin getattr in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = self.down(torch.relu(self.up(x.reshape(b, h * w, c))))
        return x + y.reshape(b, h, w, c)


def test_code_that_asks_for_a_shape_is_edited() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 3)
    student = bd.bidensify(nn.Sequential(nn.Linear(3, 8), Shaped(), nn.Linear(8, 3)), ALL, example_inputs=x).eval()
    assert student.bidensify_plan.notes == []
    # Its functional ReLU went into the layer.
    assert student[1].up.activation.__class__.__name__ == "RPReLU"
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(student)))(x), student(x))
