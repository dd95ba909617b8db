"""linear="all": attention and MLP projections; the residual rule, the scale, packing, tied weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize(("make", "after"), [(vit, "pos_drop"), (dinov2, "embeddings")])
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


@pytest.mark.parametrize(("make", "blocks"), [(vit, "Block"), (dinov2, "Dinov2Layer")])
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
