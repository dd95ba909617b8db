"""DPT (Ranftl et al., arXiv 2103.13413) on DINOv2-S as BiDense's authors set it up: transformers' backbone and neck, their head.

The last four blocks of the transformer are reassembled to maps at 1/3.5, 1/7, 1/14 and 1/28 of the image and fused from coarse to
fine, as in Depth Anything, whose neck of transformers this is; the head works at the image's full resolution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bidensify.errors import ConfigError, MissingExtraError
from bidensify.models.upernet import Head, conv_norm, make_head

__all__ = ["DPT"]


class DPT(nn.Module):
    """DPT on DINOv2: images (N, 3, H, W) to raw predictions (N, channels, H, W); H, W at least two patches.

    Args:
        classes: channels of the result with the head of segmentation.
        head: ``segmentation``, or ``depth``: one channel, which the task reads with ``output: sigmoid``.
        in_channels: channels of the image.
        hidden, layers, heads, patch: of the transformer; DINOv2-S by default.
        image: height and width in pixels that position embeddings are kept for; other sizes are interpolated.
        levels: channels of the four reassembled maps.
        features: channels of the fusion, and twice those of the head.

    Raises:
        ConfigError: the transformer has less than four blocks.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        classes: int = 150,
        head: Head = "segmentation",
        in_channels: int = 3,
        hidden: int = 384,
        layers: int = 12,
        heads: int = 6,
        patch: int = 14,
        image: int = 518,
        levels: tuple[int, int, int, int] = (48, 96, 192, 384),
        features: int = 256,
    ) -> None:
        super().__init__()
        if layers < 4 or len(levels) != 4:
            raise ConfigError(f"layers={layers}, levels={list(levels)}; DPT reads the last four blocks, one a level")
        try:
            from transformers import DepthAnythingConfig, Dinov2Backbone, Dinov2Config
            from transformers.models.depth_anything.modeling_depth_anything import DepthAnythingNeck
        except ImportError as error:
            raise MissingExtraError(
                "transformers is not installed, and DPT's backbone comes from it; pip install 'bidensify[transformers]'"
            ) from error
        backbone: Any = Dinov2Config(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, patch_size=patch, image_size=image,
            num_channels=in_channels, out_indices=list(range(layers - 3, layers + 1)), reshape_hidden_states=False,
        )  # fmt: skip
        neck: Any = DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=hidden, neck_hidden_sizes=list(levels), patch_size=patch,
            fusion_hidden_size=features,
        )  # fmt: skip
        self.patch = patch
        self.backbone = Dinov2Backbone(backbone)
        self.neck = DepthAnythingNeck(neck)
        self.out = conv_norm(features, features // 2, 3)
        self.head = make_head(head, features // 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        # Whole pairs of patches, so that halving and doubling meet.
        rows, columns = (2 * max(1, side // (2 * self.patch)) for side in size)
        x = F.interpolate(x, (rows * self.patch, columns * self.patch), mode="bilinear", align_corners=False)
        fused = self.neck(self.backbone(x).feature_maps, rows, columns)[-1]
        result: Tensor = self.head(F.interpolate(self.out(fused), size, mode="bilinear", align_corners=False))
        return result
