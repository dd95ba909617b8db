"""Metrics of several processes, and losses and metrics at their edges."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bidensify.errors import BidensifyError, ConfigError, DataError
from bidensify.tasks import DepthTask, SegmentationTask, build_task, default_palette
from bidensify.tasks.losses import cross_entropy, dice_loss, silog_loss


def batches(kind: str) -> list[tuple[Tensor, dict[str, Tensor]]]:
    torch.manual_seed(0)
    if kind == "segmentation":
        return [(torch.randn(2, 3, 5, 6), {"mask": torch.randint(0, 3, (2, 5, 6))}) for _ in range(4)]
    return [(torch.randn(2, 1, 5, 6), {"depth": torch.rand(2, 5, 6) * 4}) for _ in range(4)]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("task", [SegmentationTask(3), DepthTask()], ids=["segmentation", "depth"])
def test_two_processes_sum_to_one(task: SegmentationTask | DepthTask) -> None:
    whole = task.metrics()
    parts = [task.metrics(), task.metrics()]
    for number, (output, target) in enumerate(batches(task.name)):
        whole.update(output, target)
        parts[number % 2].update(output, target)

    def gather(value: Tensor, group: object) -> list[Tensor]:
        """Stands for all_gather: finds which state this is, and gives both processes' values."""
        name = next(n for n in parts[0]._defaults if getattr(parts[0], n) is value)
        return [value, getattr(parts[1], name)]

    parts[0].dist_sync_fn = gather
    parts[0].distributed_available_fn = lambda: True
    joined = parts[0].compute()
    assert joined == pytest.approx(whole.compute())
    assert joined.keys() == whole.compute().keys()
    whole.reset()
    with pytest.raises(DataError, match="nothing to measure"):
        whole.compute()


def test_classes_that_are_absent_do_not_count() -> None:
    task = SegmentationTask(4, class_names=("a", "b", "c", "d"))
    truth = torch.tensor([[[0, 0, 1, 1]]])
    guess = torch.tensor([[[0, 0, 1, 2]]])
    metrics = task.metrics()
    metrics.update(torch.nn.functional.one_hot(guess, 4).permute(0, 3, 1, 2).float(), {"mask": truth})
    got = metrics.compute()
    # a: 2/2, b: 1/2, c is only predicted: 0/1, d is nowhere.
    assert got["miou"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert got["iou/c"] == 0
    assert "iou/d" not in got
    assert "accuracy/c" not in got
    assert "NaN" not in json.dumps(got)


def test_prediction_is_measured_at_the_size_of_the_target() -> None:
    task = SegmentationTask(2)
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, :, 1] = 4.0
    logits[0, 0, :, 0] = 4.0
    mask = torch.zeros(1, 8, 8, dtype=torch.int64)
    mask[..., 4:] = 1
    metrics = task.metrics()
    metrics.update({"out": logits}, {"mask": mask})
    assert metrics.compute()["miou"] == 1


def test_auxiliary_head_of_torchvision() -> None:
    torch.manual_seed(0)
    out, aux, mask = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2), torch.randint(0, 3, (1, 8, 8))
    with_aux = SegmentationTask(3).loss({"out": out, "aux": aux}, {"mask": mask})
    alone = SegmentationTask(3).loss(out, {"mask": mask})
    head = SegmentationTask(3).loss(aux, {"mask": mask})
    assert with_aux.item() == pytest.approx((alone + 0.4 * head).item(), rel=1e-6)
    assert SegmentationTask(3, aux_weight=0.0).loss({"out": out, "aux": aux}, {"mask": mask}) == alone


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_no_labelled_pixel_gives_zero_and_finite_gradients(dice: float) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = SegmentationTask(3, dice=dice).loss(logits, {"mask": torch.full((2, 4, 4), 255)})
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_only_weightless_classes_give_zero() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(1, 4, 4).long(), ignore_index=255, weight=torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(logits.grad).all()


def test_losses_are_differentiable() -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (2, 3, 3))
    mask[0, 0] = 255
    logits = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, mask, ignore_index=255), logits)
    depth = torch.rand(2, 3, 3, dtype=torch.float64) + 0.5
    valid = torch.rand(2, 3, 3) > 0.3
    log = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: silog_loss(x, depth, valid), log)


def test_silog_loss_equals_numpy() -> None:
    random = np.random.default_rng(0)
    log, depth = random.normal(size=(3, 4, 5)), random.uniform(1, 5, (3, 4, 5))
    valid = random.random((3, 4, 5)) > 0.3
    valid[1] = False
    expected = []
    for n in (0, 2):
        d = log[n][valid[n]] - np.log(depth[n][valid[n]])
        expected.append(math.sqrt(np.mean(d**2) - 0.85 * np.mean(d) ** 2 + 1e-8))
    got = silog_loss(torch.tensor(log), torch.tensor(depth), torch.tensor(valid), focus=0.85)
    assert got.item() == pytest.approx(np.mean(expected))
    nothing = torch.tensor(log, requires_grad=True)
    loss = silog_loss(nothing, torch.tensor(depth), torch.zeros(3, 4, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(nothing.grad).all()


@pytest.mark.parametrize("output", ["log", "linear", "sigmoid", "inverse"])
def test_every_meaning_of_the_depth_channel(output: str) -> None:
    task = build_task("depth", output=output, min_depth=0.5, max_depth=10.0)
    depth = torch.rand(1, 6, 6) * 8 + 1
    share = (depth - 0.5) / 9.5
    raw = {"log": depth.log(), "linear": depth, "sigmoid": torch.log(share / (1 - share)), "inverse": 1 / depth}[output]
    assert torch.allclose(task.predict(raw, None), depth, rtol=1e-4)
    assert task.loss(raw[:, None], {"depth": depth}).item() < 1e-3
    metrics = task.metrics()
    metrics.update({"predicted_depth": raw}, {"depth": depth})
    assert metrics.compute()["absrel"] < 1e-4
    # An output far from any depth still learns.
    wild = torch.full((1, 1, 6, 6), -0.7, requires_grad=True)
    loss = task.loss(wild, {"depth": depth})
    loss.backward()
    assert torch.isfinite(loss)
    assert wild.grad is not None
    assert wild.grad.abs().sum() > 0


def test_half_precision_outputs_are_measured_in_float32() -> None:
    logits = torch.randn(1, 3, 4, 4)
    assert SegmentationTask(3).loss(logits.bfloat16(), {"mask": torch.zeros(1, 4, 4).long()}).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "quoted"),
    [
        ("segmentation", {"num_classes": 1}, "num_classes is 1"),
        ("segmentation", {"num_classes": 3, "class_weights": [1.0]}, "class_weights has 1"),
        ("segmentation", {"num_classes": 2, "class_weights": [-1.0, 1.0]}, "class_weights"),
        ("segmentation", {"num_classes": 2, "class_names": ["a", "a"]}, "class_names"),
        ("segmentation", {"num_classes": 2, "dice": -1.0}, "dice is -1.0"),
        ("segmentation", {"num_clases": 2}, "num_clases"),
        ("segmentation", {}, "num_classes"),
        ("depth", {"min_depth": 0.0}, "min_depth=0.0"),
        ("depth", {"output": "exp"}, "'exp'"),
        ("depth", {"focus": 2.0}, "focus=2.0"),
    ],
)
def test_mistakes(name: str, options: dict[str, object], quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted):
        build_task(name, **options)


def test_targets_that_do_not_fit() -> None:
    logits = torch.zeros(2, 3, 4, 4)
    with pytest.raises(BidensifyError, match="needs 'mask'"):
        SegmentationTask(3).loss(logits, {"depth": torch.zeros(2, 4, 4)})
    with pytest.raises(BidensifyError, match=r"\(1, 4, 4\)"):
        SegmentationTask(3).loss(logits, {"mask": torch.zeros(1, 4, 4).long()})


def test_pictures_show_the_palette_and_black_for_nothing() -> None:
    palette = ((255, 0, 0), (0, 255, 0))
    task = SegmentationTask(2, palette=palette)
    mask = torch.tensor([[0, 1], [255, 1]])
    picture = task.picture(None, mask)
    assert [tuple(picture[:, i, j].tolist()) for i in (0, 1) for j in (0, 1)] == [*palette, (0, 0, 0), palette[1]]
    assert task.picture(torch.zeros(3, 4, 4, dtype=torch.uint8), mask).shape == (3, 4, 4)
    mixed = task.picture(torch.full((3, 2, 2), 100, dtype=torch.uint8), mask, blend=0.5)
    assert mixed[:, 0, 0].tolist() == [178, 50, 50]
    scores = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    assert torch.equal(task.picture(None, scores), task.picture(None, torch.tensor([[0, 1]])))
    assert len(set(default_palette(40))) == 40

    depth = torch.tensor([[0.0, 1.0], [4.0, float("inf")]])
    picture = DepthTask().picture(None, depth, limits=(1.0, 4.0))
    assert picture[:, 0, 0].tolist() == picture[:, 1, 1].tolist() == [0, 0, 0]
    assert picture[:, 0, 1].sum() > picture[:, 1, 0].sum()
