"""Every class behind transformers' AutoModels for dense prediction, at random weights and a small configuration.

The blocks, stages and heads are those of the published models; only widths, depths and image sizes are smaller, so that
each network is built and rewritten in seconds. Backbones that a class is published with stand behind "@".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["INPUTS", "MODELS", "UNAVAILABLE"]

# A backbone is never fetched from a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _dinov2(image: int, patch: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "dinov2", "image_size": image, "patch_size": patch, "hidden_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 2, "mlp_ratio": 2, **more,
    }  # fmt: skip


def _swin(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "swin", "image_size": 64, "embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4],
        "window_size": 4, "out_features": _STAGES, **more,
    }  # fmt: skip


def _resnet(layer_type: str = "bottleneck", **more: Any) -> dict[str, Any]:
    return {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 2, 2, 2],
        "layer_type": layer_type, "out_features": _STAGES, **more,
    }  # fmt: skip


def _convnext() -> dict[str, Any]:
    return {
        "model_type": "convnext", "hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2], "out_features": _STAGES,
        "image_size": 64,
    }  # fmt: skip


def _vit(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
        "patch_size": 16, **more,
    }  # fmt: skip


_BEIT = _vit(
    use_relative_position_bias=True,
    out_indices=[1, 2, 3, 4],
    use_auxiliary_head=True,
    auxiliary_channels=16,
    num_labels=5,
)
_BIT = {
    "model_type": "bit", "embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [2, 2, 2, 2],
    "layer_type": "bottleneck", "num_groups": 8, "global_padding": "same", "embedding_dynamic_padding": True,
    "out_features": ["stage1", "stage2", "stage3"],
}  # fmt: skip
_DPT = _vit(backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 24, 32, 40], fusion_hidden_size=32, num_labels=5)
_HYBRID = dict(
    _DPT, is_hybrid=True, backbone_config=_BIT, backbone_featmap_shape=[1, 64, 4, 4], neck_ignore_stages=[0, 1],
    neck_hidden_sizes=[32, 48, 24, 40],
)  # fmt: skip
_MIT = {
    "depths": [2, 2, 2, 2], "hidden_sizes": [16, 32, 40, 64], "num_attention_heads": [1, 2, 4, 4],
    "decoder_hidden_size": 32,
}  # fmt: skip
_DEPTH_ANYTHING = {
    "patch_size": 8, "reassemble_hidden_size": 32, "neck_hidden_sizes": [16, 24, 32, 40], "fusion_hidden_size": 32,
    "head_hidden_size": 16,
    "backbone_config": _dinov2(64, 8, out_indices=[1, 2, 3, 4], reshape_hidden_states=False),
}  # fmt: skip
_TIPS = {
    "backbone_config": {
        "model_type": "tipsv2_vision_model", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 14, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False,
    },
    "neck_hidden_sizes": [16, 24, 32, 40], "fusion_hidden_size": 32, "num_depth_bins": 16, "num_labels": 5,
}  # fmt: skip
_EOMT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
    "num_blocks": 2, "num_queries": 5, "num_upscale_blocks": 2, "mlp_ratio": 2, "num_labels": 5,
}  # fmt: skip
_EOMT_DINOV3 = {
    **{key: value for key, value in _EOMT.items() if key != "mlp_ratio"}, "intermediate_size": 64,
}  # fmt: skip
_MASK2FORMER = {
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64, "encoder_layers": 2,
    "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 64, "num_queries": 5, "num_labels": 5,
}  # fmt: skip
_MASKFORMER = {
    "fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": 5,
    "decoder_config": {
        "model_type": "detr", "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32, "num_queries": 5,
    },
}  # fmt: skip
_DETR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 8, "decoder_attention_heads": 8, "num_queries": 5, "num_labels": 5,
}  # fmt: skip
_ONEFORMER = {
    "conv_dim": 32, "mask_dim": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64, "encoder_layers": 2,
    "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 64, "num_queries": 5, "num_labels": 5,
    "task_seq_len": 8, "text_encoder_width": 32, "text_encoder_context_length": 8, "text_encoder_num_layers": 1,
    "text_encoder_vocab_size": 64, "text_encoder_n_ctx": 2, "query_dec_layers": 1,
}  # fmt: skip
_UPERNET = {"hidden_size": 32, "auxiliary_channels": 16, "num_labels": 5}
_ZOEDEPTH = {
    "neck_hidden_sizes": [16, 24, 32, 40], "fusion_hidden_size": 32, "bottleneck_features": 32, "num_relative_features": 8,
    "num_attractors": [4, 3, 2, 1], "bin_embedding_dim": 16,
    "backbone_config": {"model_type": "beit", **_vit(use_relative_position_bias=True, reshape_hidden_states=False,
                        out_features=_STAGES)},
}  # fmt: skip

# (AutoModelFor..., class, variant): keyword arguments of its configuration.
_CONFIGS: dict[tuple[str, str, str], Mapping[str, Any]] = {
    ("SemanticSegmentation", "BeitForSemanticSegmentation", ""): _BEIT,
    ("SemanticSegmentation", "Data2VecVisionForSemanticSegmentation", ""): _BEIT,
    ("SemanticSegmentation", "DPTForSemanticSegmentation", ""): _DPT,
    ("SemanticSegmentation", "DPTForSemanticSegmentation", "hybrid"): _HYBRID,
    ("SemanticSegmentation", "MobileNetV2ForSemanticSegmentation", ""): {
        "num_labels": 5, "depth_multiplier": 0.5, "image_size": 64,
    },
    ("SemanticSegmentation", "MobileViTForSemanticSegmentation", ""): {
        "image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
        "num_attention_heads": 2,
        "aspp_out_channels": 32, "num_labels": 5,
    },
    ("SemanticSegmentation", "MobileViTV2ForSemanticSegmentation", ""): {
        "image_size": 64, "width_multiplier": 0.25, "aspp_out_channels": 32, "n_attn_blocks": [2, 2, 2], "num_labels": 5,
    },
    ("SemanticSegmentation", "Sapiens2ForSemanticSegmentation", ""): {
        **_vit(num_hidden_layers=3), "num_key_value_attention_heads": 1, "num_first_full_attention_layers": 1,
        "num_last_full_attention_layers": 1, "num_labels": 5,
        "head_config": {"upsample_out_channels": [32, 24], "conv_out_channels": [24, 16]},
    },
    ("SemanticSegmentation", "SegformerForSemanticSegmentation", ""): {**_MIT, "num_labels": 5},
    ("SemanticSegmentation", "Tipsv2DptForSemanticSegmentation", ""): _TIPS,
    ("SemanticSegmentation", "UperNetForSemanticSegmentation", ""): {**_UPERNET, "backbone_config": _resnet()},
    ("SemanticSegmentation", "UperNetForSemanticSegmentation", "convnext"): {**_UPERNET, "backbone_config": _convnext()},
    ("SemanticSegmentation", "UperNetForSemanticSegmentation", "swin"): {**_UPERNET, "backbone_config": _swin()},
    ("DepthEstimation", "CHMv2ForDepthEstimation", ""): {
        "backbone_config": {
            "model_type": "dinov3_vit", "return_class_token": True,
            **_vit(num_register_tokens=2, out_indices=[1, 2, 3, 4], key_bias=True),
        },
        "post_process_channels": [16, 24, 32, 40], "fusion_hidden_size": 32, "head_hidden_size": 16,
        "number_output_channels": 16,
    },
    ("DepthEstimation", "DepthAnythingForDepthEstimation", ""): _DEPTH_ANYTHING,
    ("DepthEstimation", "DepthProForDepthEstimation", ""): {
        "patch_size": 16, "fusion_hidden_size": 32, "intermediate_hook_ids": [2, 1], "intermediate_feature_dims": [24, 24],
        "scaled_images_feature_dims": [40, 40, 32], "merge_padding_value": 1, "use_fov_model": True,
        **{f"{name}_model_config": _dinov2(16, 4) for name in ("image", "patch", "fov")},
    },
    ("DepthEstimation", "DPTForDepthEstimation", ""): _DPT,
    ("DepthEstimation", "DPTForDepthEstimation", "projection"): {
        **_DPT, "add_projection": True, "fusion_hidden_size": 256,
    },
    ("DepthEstimation", "DPTForDepthEstimation", "hybrid"): _HYBRID,
    ("DepthEstimation", "GLPNForDepthEstimation", ""): _MIT,
    ("DepthEstimation", "PromptDepthAnythingForDepthEstimation", ""): _DEPTH_ANYTHING,
    ("DepthEstimation", "Tipsv2DptForDepthEstimation", ""): _TIPS,
    ("DepthEstimation", "ZoeDepthForDepthEstimation", ""): _ZOEDEPTH,
    ("ImageToImage", "Swin2SRForImageSuperResolution", ""): {
        "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "window_size": 8, "upscale": 2,
    },
    ("UniversalSegmentation", "DetrForSegmentation", ""): {
        **_DETR, "backbone_config": _resnet(),
    },
    ("UniversalSegmentation", "DetrForSegmentation", "timm"): {
        **_DETR, "use_timm_backbone": True, "backbone": "resnet18", "use_pretrained_backbone": False,
        "backbone_config": None,
    },
    ("UniversalSegmentation", "EomtForUniversalSegmentation", ""): _EOMT,
    ("UniversalSegmentation", "EomtDinov3ForUniversalSegmentation", ""): _EOMT_DINOV3,
    ("UniversalSegmentation", "Mask2FormerForUniversalSegmentation", ""): {**_MASK2FORMER, "backbone_config": _swin()},
    ("UniversalSegmentation", "Mask2FormerForUniversalSegmentation", "resnet"): {
        **_MASK2FORMER, "backbone_config": _resnet(),
    },
    ("UniversalSegmentation", "MaskFormerForInstanceSegmentation", ""): {**_MASKFORMER, "backbone_config": _swin()},
    ("UniversalSegmentation", "MaskFormerForInstanceSegmentation", "resnet"): {
        **_MASKFORMER, "backbone_config": _resnet("basic"),
    },
    ("UniversalSegmentation", "OneFormerForUniversalSegmentation", ""): {**_ONEFORMER, "backbone_config": _swin()},
    ("UniversalSegmentation", "VideomtForUniversalSegmentation", ""): _EOMT,
}  # fmt: skip


def _key(auto: str, name: str, variant: str) -> str:
    return f"transformers:{auto}/{name}" + (f"@{variant}" if variant else "")


def _factory(name: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import copy

        import transformers

        cls = getattr(transformers, name)
        # Configurations write into the dictionaries that they are given.
        model: nn.Module = cls(cls.config_class(**copy.deepcopy(dict(settings))))
        return model

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    _key(*names): _factory(names[1], settings) for names, settings in _CONFIGS.items()
}
# bidensify derives the inputs of all of them from their configuration.
INPUTS: dict[str, Callable[[int], dict[str, Tensor]]] = {}
UNAVAILABLE: dict[str, str] = {}
