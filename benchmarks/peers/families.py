"""Small networks of seventeen families of transformers for ``ModelTesterMixin``; ``peers.py`` puts this file beside it."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import transformers as hf

from .test_modeling_common import ModelTesterMixin, floats_tensor

FOUR = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
WIDER = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}


def _convnext(**more: Any) -> hf.ConvNextConfig:
    return hf.ConvNextConfig(num_stages=4, **FOUR, out_features=["stage1", "stage2", "stage3", "stage4"], **more)


def _dinov2(size: int) -> hf.Dinov2Config:
    return hf.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=size,
        patch_size=14,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )


def _pyramid(**more: Any) -> dict[str, Any]:
    return {**FOUR, "num_attention_heads": [1, 1, 2, 2], "num_labels": 3, **more}


FAMILIES: dict[str, tuple[Callable[[], Any], tuple[str, ...], int]] = {
    "segformer": (
        lambda: hf.SegformerConfig(**_pyramid(decoder_hidden_size=16)),
        ("SegformerModel", "SegformerForImageClassification", "SegformerForSemanticSegmentation"),
        64,
    ),
    "upernet": (
        lambda: hf.UperNetConfig(
            backbone_config=_convnext(),
            hidden_size=16,
            pool_scales=[1, 2],
            auxiliary_in_channels=16,
            auxiliary_channels=8,
            num_labels=3,
        ),
        ("UperNetForSemanticSegmentation",),
        64,
    ),
    "dpt": (
        lambda: hf.DPTConfig(
            **VIT,
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            num_labels=3,
        ),
        ("DPTModel", "DPTForDepthEstimation", "DPTForSemanticSegmentation"),
        32,
    ),
    "glpn": (
        lambda: hf.GLPNConfig(**_pyramid(decoder_hidden_size=16)),
        ("GLPNModel", "GLPNForDepthEstimation"),
        64,
    ),
    "mobilenet_v2": (
        lambda: hf.MobileNetV2Config(depth_multiplier=0.25, min_depth=8, image_size=32, num_labels=3),
        ("MobileNetV2Model", "MobileNetV2ForImageClassification", "MobileNetV2ForSemanticSegmentation"),
        32,
    ),
    "mobilevit": (
        lambda: hf.MobileViTConfig(
            hidden_sizes=[12, 16, 20],
            neck_hidden_sizes=[8, 8, 16, 16, 32, 32, 32],
            num_attention_heads=2,
            image_size=64,
            num_labels=3,
        ),
        ("MobileViTModel", "MobileViTForImageClassification", "MobileViTForSemanticSegmentation"),
        64,
    ),
    "mobilevitv2": (
        lambda: hf.MobileViTV2Config(image_size=64, width_multiplier=0.25, num_labels=3),
        ("MobileViTV2Model", "MobileViTV2ForImageClassification", "MobileViTV2ForSemanticSegmentation"),
        64,
    ),
    "beit": (
        lambda: hf.BeitConfig(
            **VIT,
            image_size=32,
            patch_size=8,
            out_indices=[0, 1, 2, 3],
            pool_scales=[1, 2],
            use_auxiliary_head=True,
            num_labels=3,
        ),
        ("BeitForSemanticSegmentation",),
        32,
    ),
    "data2vec_vision": (
        lambda: hf.Data2VecVisionConfig(**VIT, image_size=32, patch_size=8, out_indices=[0, 1, 2, 3], num_labels=3),
        ("Data2VecVisionForSemanticSegmentation",),
        32,
    ),
    "depth_anything": (
        lambda: hf.DepthAnythingConfig(
            backbone_config=_dinov2(28),
            patch_size=14,
            reassemble_hidden_size=16,
            reassemble_factors=[2, 1],
            neck_hidden_sizes=[8, 8],
            fusion_hidden_size=8,
            head_hidden_size=4,
        ),
        ("DepthAnythingForDepthEstimation",),
        28,
    ),
    "swin2sr": (
        lambda: hf.Swin2SRConfig(
            image_size=16,
            patch_size=1,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=8,
            mlp_ratio=2.0,
            upscale=2,
        ),
        ("Swin2SRModel", "Swin2SRForImageSuperResolution"),
        16,
    ),
    "convnext": (
        lambda: _convnext(num_labels=3),
        ("ConvNextModel", "ConvNextForImageClassification", "ConvNextBackbone"),
        64,
    ),
    "convnextv2": (
        lambda: hf.ConvNextV2Config(num_stages=4, **FOUR, out_features=["stage2", "stage4"], num_labels=3),
        ("ConvNextV2Model", "ConvNextV2ForImageClassification", "ConvNextV2Backbone"),
        64,
    ),
    "pvt_v2": (
        lambda: hf.PvtV2Config(
            image_size=64,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            mlp_ratios=[2, 2, 2, 2],
            out_features=["stage2", "stage4"],
        ),
        ("PvtV2Model", "PvtV2ForImageClassification", "PvtV2Backbone"),
        64,
    ),
    "poolformer": (
        lambda: hf.PoolFormerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_labels=3),
        ("PoolFormerModel", "PoolFormerForImageClassification"),
        64,
    ),
    "resnet": (
        lambda: hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], out_features=["stage2", "stage4"]
        ),
        ("ResNetModel", "ResNetForImageClassification", "ResNetBackbone"),
        64,
    ),
    "regnet": (
        lambda: hf.RegNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], groups_width=4, num_labels=3
        ),
        ("RegNetModel", "RegNetForImageClassification"),
        64,
    ),
}


class _Tester:
    """What the mixin asks of a family's tester."""

    batch_size, is_training, num_channels, patch_size = 3, True, 3, 8

    def __init__(self, config: Callable[[], Any], size: int) -> None:
        self.get_config, self.image_size = config, size

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        return self.get_config(), {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        }


def _case(name: str) -> type:
    config, classes, size = FAMILIES[name]

    def set_up(self: Any) -> None:
        self.model_tester = _Tester(config, size)

    fields = {
        "all_model_classes": tuple(getattr(hf, cls) for cls in classes),
        "setUp": set_up,
        "test_resize_embeddings": False,
        "has_attentions": False,
    }
    return type(f"Test_{name}", (ModelTesterMixin, unittest.TestCase), fields)


for _name in FAMILIES:
    globals()[f"Test_{_name}"] = _case(_name)
del _name
