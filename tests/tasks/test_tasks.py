"""Tasks against plain NumPy: losses, metrics, what they read, and labels that do not exist."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bidensify.errors import BidensifyError, DataError
from bidensify.tasks import build_task


def segmentation(**options: object) -> object:
    return build_task("segmentation", **{"num_classes": 3, "ignore_index": 255, **options})


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_segmentation_metrics_equal_loops(seed: int) -> None:
    random = np.random.default_rng(seed)
    prediction = random.integers(0, 3, (2, 4, 5))
    truth = random.choice([0, 1, 2, 255], (2, 4, 5), p=[0.4, 0.3, 0.2, 0.1])
    if (truth == 255).all():
        return
    metrics = segmentation(class_names=("a", "b", "c")).metrics()
    for number in range(2):
        logits = torch.nn.functional.one_hot(torch.tensor(prediction[number : number + 1]), 3).permute(0, 3, 1, 2)
        metrics.update(logits.float(), {"mask": torch.tensor(truth[number : number + 1])})
    got = metrics.compute()
    ious, accuracies, right, seen = [], [], 0, 0
    for c in range(3):
        both = union = total = 0
        for p, t in zip(prediction.ravel(), truth.ravel()):
            if t == 255:
                continue
            both += p == c and t == c
            union += p == c or t == c
            total += t == c
        seen += total
        right += both
        if union:
            ious.append(both / union)
            assert got[f"iou/{'abc'[c]}"] == pytest.approx(both / union)
        if total:
            accuracies.append(both / total)
    assert got["miou"] == pytest.approx(np.mean(ious))
    assert got["pixel_accuracy"] == pytest.approx(right / seen)
    assert got["mean_pixel_accuracy"] == pytest.approx(np.mean(accuracies))


def test_cross_entropy_with_weights_and_ignored_pixels() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    mask = torch.randint(0, 3, (2, 4, 5))
    mask[0, :2] = 255
    weights = [1.0, 2.0, 0.5]
    total = norm = 0.0
    for n in range(2):
        for i in range(4):
            for j in range(5):
                label = int(mask[n, i, j])
                if label != 255:
                    scores = np.exp(logits[n, :, i, j].numpy())
                    total -= weights[label] * np.log(scores[label] / scores.sum())
                    norm += weights[label]
    assert segmentation(class_weights=weights).loss(logits, {"mask": mask}).item() == pytest.approx(total / norm)


def test_dice_is_zero_for_a_perfect_prediction_and_adds_to_the_loss() -> None:
    mask = torch.randint(0, 3, (1, 8, 8))
    perfect = 50.0 * torch.nn.functional.one_hot(mask, 3).permute(0, 3, 1, 2).float()
    assert segmentation(dice=1.0).loss(perfect, {"mask": mask}).item() < 1e-3
    wrong = perfect.roll(1, 1)
    plain, with_dice = segmentation(), segmentation(dice=1.0)
    extra = with_dice.loss(wrong, {"mask": mask}) - plain.loss(wrong, {"mask": mask})
    assert extra.item() > 0.5


@pytest.mark.parametrize("label", [3, 7, -1, 254])
def test_a_label_outside_the_classes_is_quoted(label: int) -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    mask[0, 1, 2] = label
    with pytest.raises(DataError, match=str(label)):
        segmentation().loss(torch.zeros(1, 3, 4, 4), {"mask": mask})


def test_every_kind_of_output_is_read() -> None:
    logits = torch.randn(2, 3, 4, 4)
    task = segmentation()
    outputs = [logits, {"out": logits, "aux": logits}, {"logits": logits}, SimpleNamespace(logits=logits)]
    for output in outputs:
        assert torch.equal(task.logits(output), logits)
    assert task.predict(logits, (8, 8)).shape == (2, 8, 8)
    with pytest.raises(BidensifyError):
        task.logits("nonsense")
    with pytest.raises(BidensifyError, match="3"):
        task.logits(torch.zeros(1, 5, 4, 4))


@pytest.mark.parametrize("output", ["log", "linear", "inverse"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_median_scaling_comes_before_the_clamp(output: str, scale: float) -> None:
    task = build_task("depth", output=output, median_scaling=True, max_depth=10.0)
    depth = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)) * 4 + 1
    raw = {"log": (depth * scale).log(), "linear": depth * scale, "inverse": 1 / (depth * scale)}[output][:, None]
    metrics = task.metrics()
    metrics.update(raw, {"depth": depth, "image": torch.zeros(2, 3, 8, 8)})
    assert metrics.compute()["absrel"] < 1e-5
    assert torch.isfinite(task.predict(torch.full_like(raw, -500.0))).all()


def depth_reference(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    d = np.log(p) - np.log(g)
    ratio = np.maximum(p / g, g / p)
    return {
        "absrel": np.mean(np.abs(p - g) / g),
        "sqrel": np.mean((p - g) ** 2 / g),
        "rmse": np.sqrt(np.mean((p - g) ** 2)),
        "rmse_log": np.sqrt(np.mean(d**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(g))),
        "silog": np.sqrt(np.mean(d**2) - np.mean(d) ** 2),
        **{f"delta{n}": np.mean(ratio < 1.25**n) for n in (1, 2, 3)},
    }


@pytest.mark.parametrize("median_scaling", [False, True])
def test_depth_metrics_equal_numpy(median_scaling: bool) -> None:
    random = np.random.default_rng(1)
    truth = random.uniform(1, 8, (3, 6, 7))
    predicted = truth * np.exp(random.normal(0.1, 0.3, truth.shape))
    truth[0, :2] = 0
    task = build_task("depth", output="log", min_depth=1e-3, max_depth=80.0, median_scaling=median_scaling)
    metrics = task.metrics()
    metrics.update(torch.tensor(np.log(predicted))[:, None], {"depth": torch.tensor(truth, dtype=torch.float32)})
    rows = []
    for p, g in zip(predicted, truth):
        p, g = p[g > 0], g[g > 0]
        # torch.median takes the lower of two middle values, and so does this reference.
        middle = lambda v: np.sort(v)[(len(v) - 1) // 2]  # noqa: E731
        rows.append(depth_reference(p * (middle(g) / middle(p) if median_scaling else 1), g))
    got = metrics.compute()
    for name in rows[0]:
        assert got[name] == pytest.approx(np.mean([row[name] for row in rows]), rel=2e-2 if median_scaling else 1e-4), (
            name
        )


def test_silog_loss_ignores_scale_more_than_shape() -> None:
    task = build_task("depth", output="log", min_depth=1e-3, max_depth=80.0)
    depth = torch.rand(1, 8, 8) * 5 + 1
    log: Tensor = depth.log()[:, None]
    exact = task.loss(log, {"depth": depth})
    scaled = task.loss(log + 0.3, {"depth": depth})
    bent = task.loss(log + 0.3 * torch.randn_like(log), {"depth": depth})
    assert exact < 1e-2
    assert exact < scaled < bent


def test_pictures_are_uint8_images() -> None:
    image = torch.randint(0, 256, (3, 8, 9), dtype=torch.uint8)
    picture = segmentation().picture(image, {"mask": torch.zeros(8, 9, dtype=torch.int64)})
    assert picture.shape == (3, 8, 9)
    assert picture.dtype == torch.uint8
    depth = build_task("depth", output="log", min_depth=0.1, max_depth=10.0).picture(image, torch.zeros(1, 1, 8, 9))
    assert depth.shape == (3, 8, 9)


def test_unknown_task() -> None:
    with pytest.raises(BidensifyError, match="segmentaton"):
        build_task("segmentaton")
