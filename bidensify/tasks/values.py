"""Optical flow and image restoration: distilled to a full-precision network's output, measured by EPE and PSNR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bidensify.tasks import pictures
from bidensify.tasks.base import DenseTask, Sample
from bidensify.tasks.outputs import resize, restore, target_of
from bidensify.tasks.registry import register_task
from bidensify.tasks.segmentation import check_weights

if TYPE_CHECKING:
    from bidensify.tasks.metrics import FlowMetrics, RestorationMetrics


@register_task("flow")
class FlowTask(DenseTask):
    """Optical flow: L1 training, end-point error (EPE) evaluation.

    The network has two channels, the motion (right, down) in pixels of its output's grid, or returns a list of such flows
    of which the last is the best (RAFT). A sample has ``flow``, float32 (2, H, W) in pixels, not finite where unknown; its
    image is whatever the network takes, for example two frames as 6 channels. No data set here reads flow: give your own
    to ``bidensify.finetune``. Metrics: ``epe`` (selects), ``outliers``.

    Args:
        aux_weight: weight of the loss of each flow of a list before the last.

    Raises:
        ConfigError: an option is out of range.

    Example:
        ::

            task: {name: flow, aux_weight: 0.8}
    """

    name = "flow"
    primary = "epe"
    higher_is_better = False
    outputs = "values"
    channels = 2
    main = -1

    def __init__(self, aux_weight: float = 0.8) -> None:
        check_weights(aux_weight=aux_weight)
        self.aux_weight = aux_weight

    def truth(self, target: Sample, batch: int) -> Tensor:
        """Returns the target's flow (N, 2, H, W)."""
        return target_of(target, "flow", self.name, batch, planes=2)

    def loss_of(self, raw: Tensor, truth: Tensor, target: Sample) -> Tensor:
        """Returns the mean of |Δright| + |Δdown| over the pixels whose flow is known; 0 if none is."""
        valid = torch.isfinite(truth).all(1, keepdim=True)
        error = (raw - torch.where(valid, truth, raw.detach())).abs().sum(1, keepdim=True)
        return error.sum() / valid.sum().clamp(min=1)

    def loss_weight(self, target: Sample) -> Tensor:
        """The pixels whose flow is known."""
        return torch.isfinite(target["flow"]).all(1).sum()

    def decide(self, raw: Tensor) -> Tensor:
        """Returns the flow (N, 2, H, W), in pixels of its grid."""
        return raw

    def resize(self, raw: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Resizes a flow; its lengths grow as its grid does."""
        return _scaled(resize(raw, size), raw.shape[-2:], size)

    def restore(self, raw: Tensor, extent: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Brings a flow back to the image's size and unit."""
        restored = restore(raw, extent, size)
        if extent is None:
            return _scaled(restored, raw.shape[-2:], size)
        rows = extent.reshape(-1, 4).tolist()
        # In pixels of the input first, then of the image.
        parts = [
            _scaled(_scaled(flow[None], raw.shape[-2:], (row[2], row[3])), (row[0], row[1]), size)
            for flow, row in zip(restored, rows * (len(restored) // len(rows)), strict=True)
        ]
        return torch.cat(parts)

    def metrics(self) -> FlowMetrics:
        """Returns fresh metrics; see :class:`bidensify.tasks.metrics.FlowMetrics`."""
        from bidensify.tasks.metrics import FlowMetrics

        return FlowMetrics(self.read, "no image had a pixel with a known flow")

    def picture(self, image: Tensor | None, output_or_target: Any, *, blend: float = 0.0) -> Tensor:
        """Colours one flow by direction (hue) and length: a sample with ``flow``, a flow (2, H, W), or an output."""
        from torchvision.utils import flow_to_image

        found = output_or_target
        if isinstance(found, dict) and "flow" in found:
            found = found["flow"]
        elif not isinstance(found, Tensor) or found.ndim != 3:
            found = self.predict(found, None if image is None else (image.shape[-2], image.shape[-1]))
        flow = found.reshape(2, *found.shape[-2:]).detach().float().cpu()
        return pictures.finish(flow_to_image(torch.nan_to_num(flow, 0, 0, 0)), image, blend)


def _scaled(flow: Tensor, before: Any, after: Any) -> Tensor:
    if after is None or tuple(before) == tuple(after):
        return flow
    return flow * flow.new_tensor([after[1] / before[1], after[0] / before[0]]).view(1, 2, 1, 1)


@register_task("restoration")
class RestorationTask(DenseTask):
    """Image restoration (noise, blur, rain): L1 training, PSNR and SSIM evaluation.

    The network gives the clean image in [0, 1], of any number of channels. A sample has ``target``, float32 (C, H, W) in
    [0, 1]; ``image_mask_folder`` reads it with its option ``targets``. Metrics: ``psnr`` (selects), ``ssim``.

    Args:
        aux_weight: weight of the loss of each auxiliary output, where the network has some.

    Raises:
        ConfigError: an option is out of range.

    Example:
        ::

            task: {name: restoration, aux_weight: 0.4}
    """

    name = "restoration"
    primary = "psnr"
    higher_is_better = True
    outputs = "values"
    channels = None

    def __init__(self, aux_weight: float = 0.4) -> None:
        check_weights(aux_weight=aux_weight)
        self.aux_weight = aux_weight

    def truth(self, target: Sample, batch: int) -> Tensor:
        """Returns the clean image (N, C, H, W)."""
        planes = target["target"].shape[1] if "target" in target and target["target"].ndim == 4 else 3
        return target_of(target, "target", self.name, batch, planes=planes)

    def loss_of(self, raw: Tensor, truth: Tensor, target: Sample) -> Tensor:
        """Returns the mean absolute difference."""
        return (raw - truth.to(raw.dtype)).abs().mean()

    def loss_weight(self, target: Sample) -> Tensor:
        """The images."""
        return torch.tensor(len(target["target"]))

    def decide(self, raw: Tensor) -> Tensor:
        """Returns the image (N, C, H, W), clamped to [0, 1]."""
        return raw.clamp(0, 1)

    def metrics(self) -> RestorationMetrics:
        """Returns fresh metrics; see :class:`bidensify.tasks.metrics.RestorationMetrics`."""
        from bidensify.tasks.metrics import RestorationMetrics

        return RestorationMetrics(self.read, "no image was given")

    def picture(self, image: Tensor | None, output_or_target: Any, *, blend: float = 0.0) -> Tensor:
        """Shows one restored image: a sample with ``target``, an image (C, H, W) in [0, 1], or a model's output."""
        found = output_or_target
        if isinstance(found, dict) and "target" in found:
            found = found["target"]
        elif not isinstance(found, Tensor) or found.ndim != 3:
            found = self.predict(found, None if image is None else (image.shape[-2], image.shape[-1]))
        shown = found.reshape(-1, *found.shape[-2:]).detach().float().cpu().clamp(0, 1)
        shown = shown[:3] if len(shown) >= 3 else shown[:1].expand(3, -1, -1)
        return pictures.finish((shown * 255).round().to(torch.uint8), image, blend)
