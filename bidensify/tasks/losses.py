"""Losses of the tasks; each is finite, with finite gradients, on a batch without a single labelled pixel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, target: Tensor, *, ignore_index: int, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the labelled pixels.

    Args:
        logits: (N, C, H, W).
        target: class indices, int64 (N, H, W).
        ignore_index: label of pixels that do not count.
        weight: (C,), weight of each class; the mean is over the weights, as in
            :func:`torch.nn.functional.cross_entropy`.

    Returns:
        A scalar; 0 where no pixel counts (a crop may hold none), where PyTorch's mean would be NaN.
    """
    counts = target != ignore_index
    if weight is not None:
        counts = counts & (weight[torch.where(counts, target, torch.zeros_like(target))] > 0)
        # Were they not ignored, a batch of classes of weight 0 alone would divide 0 by 0 in the gradient.
        target = torch.where(counts, target, torch.full_like(target, ignore_index))
    loss = F.cross_entropy(logits, target, weight=weight, ignore_index=ignore_index)
    return torch.where(counts.any(), loss, torch.zeros_like(loss))


def dice_loss(logits: Tensor, target: Tensor, *, ignore_index: int, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss: the mean over the classes present in ``target`` of 1 − (2·Σp·t + s) / (Σp + Σt + s).

    Sums run over the labelled pixels of the whole batch (V-Net, arXiv 1606.04797, equation of section 3, with linear
    sums in the denominator).

    Args:
        logits: (N, C, H, W).
        target: class indices, int64 (N, H, W).
        ignore_index: label of pixels that do not count.
        smooth: s, pixels.

    Returns:
        A scalar in [0, 1]; 0 where no pixel counts.
    """
    valid = target != ignore_index
    index = torch.where(valid, target, torch.zeros_like(target)).unsqueeze(1)
    probability = logits.softmax(1) * valid.unsqueeze(1)
    truth = torch.zeros_like(probability).scatter_(1, index, valid.unsqueeze(1).to(probability.dtype))
    overlap = (probability * truth).sum((0, 2, 3))
    pixels = truth.sum((0, 2, 3))
    dice = (2 * overlap + smooth) / (probability.sum((0, 2, 3)) + pixels + smooth)
    present = (pixels > 0).to(dice.dtype)
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def binary_cross_entropy(logits: Tensor, truth: Tensor, valid: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy over the pixels that count.

    Args:
        logits: (N, C, H, W).
        truth: 0 and 1, floating point (N, C, H, W).
        valid: bool (N, C, H, W).
        weight: (C,), weight of the pixels where the truth is 1.

    Returns:
        A scalar; 0 where no pixel counts.
    """
    weight = None if weight is None else weight.view(-1, 1, 1)
    loss = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight, reduction="none")
    return torch.where(valid, loss, torch.zeros_like(loss)).sum() / valid.sum().clamp(min=1)


def binary_dice_loss(logits: Tensor, truth: Tensor, valid: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss of labels that do not exclude each other: the mean over the labels of
    1 − (2·Σp·t + s) / (Σp + Σt + s), with p the sigmoid and sums over the pixels of the whole batch that count.

    Args:
        logits: (N, C, H, W).
        truth: 0 and 1, floating point (N, C, H, W).
        valid: bool (N, C, H, W).
        smooth: s, pixels.

    Returns:
        A scalar in [0, 1]; 0 where no pixel counts.
    """
    probability, truth = logits.sigmoid() * valid, truth * valid
    overlap, sums = ((value.sum((0, 2, 3))) for value in (probability * truth, probability + truth))
    counts = valid.sum((0, 2, 3)) > 0
    return (((1 - (2 * overlap + smooth) / (sums + smooth)) * counts).sum() / counts.sum().clamp(min=1)).to(
        logits.dtype
    )


def silog_loss(log_prediction: Tensor, target: Tensor, valid: Tensor, *, focus: float = 0.85) -> Tensor:
    """Scale-invariant log loss, √(mean d² − focus · (mean d)²) per image with d = log prediction − log target.

    Eigen et al., arXiv 1406.2283, equation 4, under a root and with the weight ``focus`` as in BTS (arXiv 1907.10326,
    equation 4). ``focus`` = 1 ignores an image's overall scale entirely.

    Args:
        log_prediction: natural logarithm of the predicted depth, (N, H, W).
        target: depth, (N, H, W), positive where ``valid``.
        valid: bool (N, H, W).

    Returns:
        The mean over the images with a valid pixel, a scalar; 0 where there is none.
    """
    log_target = torch.where(valid, target, torch.ones_like(target)).log()
    difference = torch.where(valid, log_prediction - log_target, torch.zeros_like(log_prediction))
    count = valid.sum((1, 2))
    known = count > 0
    count = count.clamp(min=1).to(difference.dtype)
    mean = difference.sum((1, 2)) / count
    # mean d² − (mean d)² as a variance: the difference of two large numbers would lose its digits.
    deviation = torch.where(valid, difference - mean[:, None, None], torch.zeros_like(difference))
    variance = deviation.square().sum((1, 2)) / count
    # The small constant bounds the root's gradient at a perfect prediction.
    per_image = (variance + (1 - focus) * mean.square() + 1e-8).sqrt()
    return (per_image * known).sum() / known.sum().clamp(min=1)
