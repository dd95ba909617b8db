"""The networks of the paper's tables: their sizes, shapes, rewrites in the paper's frame, and weights of a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.models import build_model
from bidensify.recipe import load_recipe

ROOT = Path(__file__).parents[2]
UPERNET: dict[str, Any] = {"depths": [1, 1, 2, 1], "widths": [8, 16, 16, 32], "features": 16, "classes": 5}
DPT: dict[str, Any] = {"hidden": 16, "layers": 4, "heads": 2, "image": 56, "levels": [8, 8, 8, 8], "features": 16}


def test_upernet_has_the_paper_s_parameters() -> None:
    """The paper counts 40,023 K; what is left is 0.4 %."""
    with torch.device("meta"):
        model = build_model("paper:upernet_convnext_tiny", classes=151)
    assert sum(p.numel() for p in model.parameters()) == 39_870_839
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(convolutions) - 1  # all but the last


def test_the_counts_of_docs_paper() -> None:
    """BNN in the paper's frame: what `summary` says, and what is left of it when the head's 3x3 convolution counts as 1-bit."""
    recipe = load_recipe(ROOT / "recipes" / "paper" / "ade20k_upernet_paper.yaml", ["binarize.method=bnn"])
    model = build_model("paper:upernet_convnext_tiny", classes=151)
    student = bd.bidensify(model, recipe.config(), example_inputs=torch.zeros(2, 3, 64, 64), inplace=True)
    counts = bd.summary(student, (1, 3, 64, 64))
    assert counts.total("params") == 1_603_478
    rows = {row.path: row for row in counts.layers}
    assert rows["head.0"].float_params == 147_456
    assert (counts.total("params") - 147_456 * 31 / 32) / 1e3 == pytest.approx(1470, rel=0.02)  # the paper's figure
    assert "| BNN | 1,603 | 1,461 | 1,470 |" in (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [(64, 96), (63, 101), (33, 32)])
def test_any_size_and_both_heads(size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *size)
    for head, channels in (("segmentation", 5), ("depth", 1)):
        model = build_model("paper:upernet_convnext_tiny", **{**UPERNET, "head": head}).eval()
        assert model(image).shape == (2, channels, *size)
    pytest.importorskip("transformers")
    model = build_model("paper:dpt_dinov2_small", **DPT, head="depth").eval()
    assert model(image).shape == (2, 1, *size)


def test_dpt_reassembles_four_levels_of_dinov2_s() -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = build_model("paper:dpt_dinov2_small", classes=150)
    backbone: Any = model.backbone
    assert sum(p.numel() for p in backbone.parameters()) == 22_056_576  # DINOv2-S
    assert backbone.config.out_indices == [9, 10, 11, 12]
    assert [layer.projection.out_channels for layer in model.neck.reassemble_stage.layers] == [48, 96, 192, 384]


@pytest.mark.parametrize("method", ["bnn", "react", "adabin", "bisrnet", "bidense"])
def test_the_frame_of_the_paper(method: str) -> None:
    model = build_model("paper:upernet_convnext_tiny", **UPERNET)
    config = bd.BidensifyConfig(method=method, frame="paper")
    student = bd.bidensify(model, config, example_inputs=torch.zeros(2, 3, 64, 64))
    layers = dict(bd.nn.binary_layers(student))
    bypasses = {layer.bypass is not None for layer in layers.values()}
    reasons = " ".join(layer.reason for layer in student.bidensify_plan.binary)
    assert all(layer.norm is not None for layer in layers.values())
    if method == "bidense":
        assert bypasses == {True}
        assert "replaces the residual add" in reasons
    else:
        assert bypasses == {False}
        assert "residual" not in reasons
    # The adds are there: an input of the block that nothing else carries comes through.
    block = student.backbone.stages[0][0].eval()
    with torch.no_grad():
        for layer in bd.nn.binary_layers(block):
            layer[1].norm.weight.zero_()
            layer[1].norm.bias.zero_()
        x = torch.randn(1, 8, 8, 8)
        assert block(x).std() > 0.1


def test_networks_of_the_paper_pack_bit_for_bit() -> None:
    pytest.importorskip("transformers")
    for source, options in (
        ("paper:upernet_convnext_tiny", UPERNET),
        ("paper:dpt_dinov2_small", {**DPT, "classes": 5}),
    ):
        linear = "all" if "dpt" in source else "pointwise"
        image = torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
        student = bd.bidensify(
            build_model(source, **options), bd.BidensifyConfig(linear=linear), example_inputs=image
        ).eval()
        student = student.to(memory_format=torch.channels_last)
        with torch.no_grad():
            assert torch.equal(bd.pack(student)(image), student(image))


def test_weights_of_a_part(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    donor = build_model("paper:dpt_dinov2_small", **DPT)
    file = tmp_path / "backbone.safetensors"
    save_file({f"model.{name}": value for name, value in donor.backbone.state_dict().items()}, file)
    with pytest.warns(UserWarning, match="the prefix 'model.' taken off"):
        model = build_model("paper:dpt_dinov2_small", **DPT, weights_file={"backbone": str(file)})
    for name, value in donor.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    with pytest.raises(ConfigError, match=r"weights_file names the module 'bakbone'.*did you mean 'backbone'"):
        build_model("paper:dpt_dinov2_small", **DPT, weights_file={"bakbone": str(file)})


def test_the_hub_without_a_connection() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    with pytest.raises(
        ConfigError, match=r"no such folder, and the hub does not give it.*copy the model's folder here"
    ):
        build_model("transformers:nobody/no-such-network")
    with pytest.raises(ConfigError, match="Without a connection, leave pretrained out and give weights_file: FILE"):
        build_model("timm:resnet10t", pretrained=True)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no such network.*upernet_convnext_tiny"):
        build_model("paper:upernet")
    with pytest.raises(ConfigError, match="has no option 'depth'.*did you mean 'depths'"):
        build_model("paper:upernet_convnext_tiny", depth=3)
    with pytest.raises(ConfigError, match=r"widths=\[8, 8, 8, 9\].*a multiple of 4"):
        build_model("paper:upernet_convnext_tiny", depths=[1, 1, 1, 1], widths=[8, 8, 8, 9])
    with pytest.raises(ConfigError, match="head='flow' is not known"):
        build_model("paper:upernet_convnext_tiny", head="flow")
    with pytest.raises(ConfigError, match="layers=3.*DPT reads the last four blocks"):
        build_model("paper:dpt_dinov2_small", layers=3)
