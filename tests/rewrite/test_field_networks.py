"""Networks of the field convert with the plan that each asks for, and keep what every rewrite keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import field_branches
import field_depth_flow
import field_gates
import field_realtime
import pytest
import torch
from invariants import examine
from random_networks import settle

# What takes seconds per network; the random networks have their share of it, and export is asked of one of each kind.
SLOW = ("compile", "export", "round_trip", "replay")


@dataclass(frozen=True)
class Expected:
    """What the plan of a network has to say.

    Attributes:
        removed: layers whose bypass replaces a residual add.
        without: binary layers with no bypass, since an add or a sum carries the signal.
        kept: layer -> the beginning of the reason why it stays.
        notes: how many blocks could not be edited.
    """

    removed: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)
    notes: int = 0


FIRST, LAST, POOLED, RAW, GATE = "first layer on the image", "prediction layer", "on a pooled 1×1 map", "on ", "gate"
EXPECTED = {
    # Dropout may take the extension away, and the pooled shortcut is narrower: every add stays.
    "ENet": Expected(
        without=("down1.ext.6", "down2.ext.6", *(f"stage1.{i}.expand.0" for i in range(2)),
                 *(f"stage2.{i}.expand.0" for i in range(3))),
        kept={"first": FIRST, "full": LAST},
    ),
    "ERFNet": Expected(
        removed=("layers.1.conv1x3_2", "layers.3.conv1x3_2", "layers.4.conv1x3_2", "refine.conv1x3_2"),
        kept={"initial.conv": FIRST, "output": LAST},
    ),
    "BiSeNetV2": Expected(
        removed=("semantic.1.conv2.0", "semantic.3.conv2.0"),
        without=("semantic.0.conv2.0", "semantic.2.conv2.0"),
        kept={"detail.0.0": FIRST, "stem.0": FIRST, "bga.semantic_up.0": GATE, "bga.semantic_keep.2": GATE,
              "head.2": LAST, "aux.0.0": "never called", "aux.1": "never called"},
    ),
    # The low resolution has the high one's stream from the first exchange on.
    "DDRNet": Expected(
        removed=("layer1.0.conv2", "layer1.1.conv2", "layer3_.conv2", "layer4_.conv2"),
        without=("layer3.conv2", "layer4.conv2", "down3.0", "down4.1.0", "spp.compression.2", "spp.shortcut.2"),
        kept={"conv1.0.0": FIRST, "spp.scale2.3": POOLED, "predict": LAST},
    ),
    # The global average is one value for all pixels: the refined branch keeps its own signal.
    "STDC": Expected(
        kept={"stem.0.0": FIRST, "average.0": POOLED, "arm_atten": POOLED, "ffm1": POOLED, "ffm2": POOLED, "out.1": LAST}
    ),
    "ObjectContext": Expected(
        removed=("backbone.1.conv2",), without=("backbone.2.conv2",),
        kept={"backbone.0.0": FIRST, "aux_head.1": LAST, "cls_head": LAST},
    ),
    "PIDNet": Expected(
        removed=("layer_p.conv2", "layer_d.conv2"), without=("layer_i.conv2", "conv_i.0"),
        kept={"conv1.0.0": FIRST, "out": LAST},
    ),
    "FastDepth": Expected(kept={"conv0.0": FIRST, "decode_conv4.0": LAST}),
    "Monodepth2": Expected(
        without=("encoder.1.conv2", "encoder.2.conv2"),
        kept={"encoder.0.0": FIRST, "decoder.2.1": LAST, "decoder.5.1": LAST, "decoder.8.1": LAST},
    ),
    # Its code makes a grid of sizes, which no trace can: the activations of the cost volumes stay functions.
    "PWCNet": Expected(
        kept={"pyramid.0.0": FIRST, "predict.2": LAST, "predict.1": LAST, "deconv.2": RAW, "deconv.1": RAW,
              "context.1": LAST},
        notes=2,
    ),
    "EDSR": Expected(
        without=("body.0.body.2", "body.1.body.2", "body.2.body.2", "body.3"),
        kept={"sub_mean": FIRST, "head.0": RAW, "tail.2": LAST, "add_mean": RAW},
    ),
    # The gate is a part of the chain: its values are no copy.
    "RCAN": Expected(
        without=(*(f"body.{i}.body.{j}.body.2" for i in range(2) for j in range(2)),
                 "body.0.body.2", "body.1.body.2", "body.2"),
        kept={"head": FIRST, "tail.2": LAST}
        | {f"body.{i}.body.{j}.body.3.conv_du.{k}": POOLED for i in range(2) for j in range(2) for k in (0, 2)},
    ),
    "DnCNN": Expected(kept={"dncnn.0": FIRST, "dncnn.11": LAST}),
    # SimpleGate is a product of two signals: behind it the shortcut alone carries the old one.
    "NAFNet": Expected(
        without=tuple(
            f"{block}.conv{k}" for block in ("encoders.0.0", "encoders.1.0", "middle.0", "decoders.0.0", "decoders.1.0")
            for k in (3, 5)
        ),
        kept={"intro": FIRST, "ending": LAST}
        | {f"{block}.sca.1": POOLED
           for block in ("encoders.0.0", "encoders.1.0", "middle.0", "decoders.0.0", "decoders.1.0")},
    ),
    "Restormer": Expected(
        without=tuple(f"{block}.{k}" for block in ("encoder", "latent", "decoder")
                      for k in ("project_attn", "project_out")),
        kept={"patch_embed": FIRST, "output": LAST},
    ),
    "AttentionUNet": Expected(
        kept={"Conv1.0": FIRST, "Att3.psi.0": GATE, "Att2.psi.0": GATE, "Conv_1x1": LAST},
    ),
    # A U-block's inside is no chain of copies (pooled, concatenated): its add stays.
    "U2Net": Expected(
        without=("stage1.rebnconv1d.0", "stage2.rebnconv1d.0", "stage1d.rebnconv1d.0"),
        kept={"stage1.rebnconvin.0": FIRST, "side1": LAST, "side2": LAST, "outconv": RAW},
    ),
    "TransUNet": Expected(
        without=("block1.conv2", "block2.conv2"),
        kept={"root.0": FIRST, "encoder.fc1": "linear layer on tokens", "encoder.fc2": "linear layer on tokens",
              "segmentation_head.0": LAST, "encoder.attn.out_proj": "never called"},
    ),
    "LaplacianPyramid": Expected(
        removed=("low.2.block.2", "low.3.block.2", "mask.1.block.2"),
        kept={"low.0": FIRST, "to_image": LAST, "mask.0": RAW, "mask.2": LAST, "refine.0": RAW, "refine.2": LAST},
    ),
}  # fmt: skip


NETWORKS = {
    name: getattr(module, name)
    for module in (field_realtime, field_branches, field_depth_flow, field_gates)
    for name in module.__all__
}


def test_every_network_has_its_plan() -> None:
    assert NETWORKS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_field_network(name: str) -> None:
    torch.manual_seed(0)
    model = settle(NETWORKS[name](), Random(0))
    image = torch.randn(2, 1 if name == "DnCNN" else 3, 32, 64, generator=torch.Generator().manual_seed(0))
    case = examine(model, (image, image.flip(-1)) if name == "PWCNet" else (image,), without=SLOW)
    expected, layers = EXPECTED[name], {layer.path: layer for layer in case.plan.layers}
    removed = {path for path, layer in layers.items() if "replaces the residual add" in layer.reason}
    assert removed == set(expected.removed)
    assert {layer.path for layer in case.plan.binary if not layer.bypass} == set(expected.without)
    assert {layer.path for layer in case.plan.kept} == set(expected.kept)
    for path, reason in expected.kept.items():
        assert layers[path].reason.startswith(reason), (path, layers[path].reason)
    assert len(case.plan.notes) == expected.notes, case.plan.notes
