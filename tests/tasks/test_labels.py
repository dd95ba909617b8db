"""Binary and multi-label segmentation against torchmetrics and plain NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics import classification as tm

import bidensify as bd
from bidensify.data import DataInfo, DenseDataset, Sample
from bidensify.errors import ConfigError, DataError
from bidensify.recipe import load_recipe
from bidensify.tasks import BinaryTask, MultiLabelTask, build_task
from bidensify.tasks.losses import binary_cross_entropy, binary_dice_loss

NAMES = ("a", "b", "c")


def batch(seed: int, labels: int, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, labels, 5, 7, generator=generator, dtype=torch.float64)
    truth = torch.randint(0, 2, (2, labels, 5, 7), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < ignored] = 255
    return logits, truth


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_metrics_equal_torchmetrics(seed: int) -> None:
    logits, truth = batch(seed, 3)
    metrics = MultiLabelTask(3, class_names=NAMES).metrics()
    for n in range(2):
        metrics.update(logits[n : n + 1], {"mask": truth[n : n + 1]})
    got = metrics.compute()
    given_ = (logits.sigmoid().float(), truth)
    for name, reference in (
        ("iou", tm.MultilabelJaccardIndex(3, average="none", ignore_index=255)),
        ("dice", tm.MultilabelF1Score(3, average="none", ignore_index=255)),
    ):
        values = reference(*given_)
        assert got[name] == pytest.approx(float(values.mean()), abs=1e-6)
        assert [got[f"{name}/{label}"] for label in NAMES] == pytest.approx(values.tolist(), abs=1e-6)
    assert got["precision"] == pytest.approx(float(tm.MultilabelPrecision(3, ignore_index=255)(*given_)), abs=1e-6)
    assert got["recall"] == pytest.approx(float(tm.MultilabelRecall(3, ignore_index=255)(*given_)), abs=1e-6)
    right = tm.MultilabelAccuracy(3, average="micro", ignore_index=255)
    assert got["pixel_accuracy"] == pytest.approx(float(right(*given_)), abs=1e-6)


def test_binary_metrics_equal_torchmetrics() -> None:
    logits, truth = batch(1, 1)
    metrics = BinaryTask().metrics()
    metrics.update(logits, {"mask": truth[:, 0]})
    got = metrics.compute()
    given_ = (logits[:, 0].sigmoid().float(), truth[:, 0])
    wanted = {
        "iou": tm.BinaryJaccardIndex(ignore_index=255), "dice": tm.BinaryF1Score(ignore_index=255),
        "precision": tm.BinaryPrecision(ignore_index=255), "recall": tm.BinaryRecall(ignore_index=255),
        "pixel_accuracy": tm.BinaryAccuracy(ignore_index=255),
    }  # fmt: skip
    assert got == pytest.approx({name: float(metric(*given_)) for name, metric in wanted.items()}, abs=1e-6)


def test_losses_equal_loops() -> None:
    logits, truth = batch(2, 2)
    weight = torch.tensor([3.0, 0.5], dtype=torch.float64)
    total, pixels, dices = 0.0, 0, []
    for label in range(2):
        overlap = sums = 0.0
        for logit, real in zip(logits[:, label].flatten().tolist(), truth[:, label].flatten().tolist()):
            if real == 255:
                continue
            p = 1 / (1 + math.exp(-logit))
            total -= weight[label].item() * math.log(p) if real else math.log(1 - p)
            pixels += 1
            overlap += p * real
            sums += p + real
        dices.append(1 - (2 * overlap + 1) / (sums + 1))
    valid, there = truth != 255, (truth == 1).double()
    assert binary_cross_entropy(logits, there, valid, weight=weight).item() == pytest.approx(total / pixels)
    assert binary_dice_loss(logits, there, valid).item() == pytest.approx(np.mean(dices))
    task = MultiLabelTask(2, bce=2, dice=0.5, pos_weight=[3, 0.5])
    loss = task.loss({"out": logits, "aux": logits}, {"mask": truth})
    assert loss.item() == pytest.approx(1.4 * (2 * total / pixels + 0.5 * np.mean(dices)))
    assert task.loss_weight({"mask": truth}) == pixels
    free = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: binary_dice_loss(x, there, valid), free)


def test_nothing_to_learn_gives_zero_and_finite_gradients() -> None:
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    loss = BinaryTask().loss(logits, {"mask": torch.full((1, 4, 4), 255)})
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_shapes_decisions_and_pictures() -> None:
    task = build_task("binary", DataInfo(2, ("ground", "leaf"), ((0, 0, 0), (0, 200, 0)), ignore_index=9))
    assert (task.class_names, task.ignore_index, task.channels, task.outputs) == (("leaf",), 9, 1, "labels")  # type: ignore[attr-defined]
    logits = torch.tensor([[[[2.0, -2.0], [-0.1, 0.1]]]])
    assert task.predict(logits).tolist() == [[[1, 0], [0, 1]]]
    assert task.predict(logits, (4, 4)).shape == (1, 4, 4)
    assert task.picture(None, logits)[1].tolist() == [[200, 0], [0, 200]]
    assert task.picture(None, {"mask": torch.tensor([[1, 9]])})[1].tolist() == [[200, 0]]
    many = MultiLabelTask(2, palette=[[200, 0, 0], [0, 100, 0]], threshold=0.9)
    both = many.picture(torch.zeros(3, 1, 2, dtype=torch.uint8), torch.tensor([[[1, 0]], [[1, 1]]]))
    assert both[:, 0].T.tolist() == [[100, 50, 0], [0, 100, 0]]
    assert many.predict(torch.tensor([[[[2.0]], [[2.3]]]])).flatten().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "options", "quoted"),
    [
        ("multilabel", {"num_classes": 0}, "num_classes is 0"),
        ("multilabel", {"num_classes": 2, "pos_weight": [1]}, "pos_weight has 1 entries"),
        ("multilabel", {"num_classes": 2, "class_names": ["a", "a"]}, "name of its own"),
        ("multilabel", {"num_classes": 2, "threshold": 1.0}, "threshold=1.0"),
        ("binary", {"bce": 0, "dice": 0}, "bce=0, dice=0"),
        ("binary", {"pos_weight": -1}, "pos_weight is -1"),
        ("binary", {"num_classes": 2}, "has no option num_classes"),
    ],
)
def test_mistakes(name: str, options: dict[str, object], quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted):
        build_task(name, **options)


def test_what_does_not_fit() -> None:
    logits = torch.zeros(1, 1, 2, 2)
    with pytest.raises(DataError, match="label 2 at row 0"):
        BinaryTask().loss(logits, {"mask": torch.full((1, 2, 2), 2)})
    with pytest.raises(ConfigError, match=r"needs \(N, 3, H, W\)"):
        MultiLabelTask(3).loss(torch.zeros(1, 3, 2, 2), {"mask": torch.zeros(1, 2, 2, 2)})
    with pytest.raises(ConfigError, match="2 channels.*'binary' needs 1"):
        BinaryTask().loss(torch.zeros(1, 2, 2, 2), {"mask": torch.zeros(1, 2, 2)})
    with pytest.raises(ConfigError, match="1 channels.*'segmentation' needs 2.*task 'binary'"):
        build_task("segmentation", num_classes=2).loss(logits, {"mask": torch.zeros(1, 2, 2)})
    with pytest.raises(ConfigError, match="data of 2 classes, this has 3"):
        build_task("binary", DataInfo(3, NAMES, ((0, 0, 0),) * 3))
    metrics = BinaryTask().metrics()
    metrics.update(-torch.ones(1, 1, 2, 2), {"mask": torch.zeros(1, 2, 2)})
    with pytest.raises(DataError, match="none of foreground occurs"):
        metrics.compute()


class Stripes(DenseDataset):
    """Two labels that may hold at once: bright columns, bright rows."""

    info = DataInfo(2, ("columns", "rows"), ((255, 0, 0), (0, 0, 255)), multilabel=True)

    def __len__(self) -> int:
        return 8

    def load(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        planes = torch.zeros(2, 16, 16, dtype=torch.int64)
        planes[0, :, int(torch.randint(0, 12, (), generator=generator)) :] = 1
        planes[1, int(torch.randint(0, 12, (), generator=generator)) :] = 1
        image = torch.randn(3, 16, 16, generator=generator) * 0.1
        image[:2] += planes
        return {"image": image, "mask": planes}


def test_multilabel_learns_through_a_run(tmp_path: object) -> None:
    recipe = load_recipe({
        "name": "stripes", "data": {"batch_size": 4}, "task": {"name": "multilabel", "num_classes": 2},
        "stages": [{"name": "a", "binarize": "none", "epochs": 25, "lr": 0.5}],
        "log": {"tensorboard": False}, "calibrate": {"batches": 0},
    })  # fmt: skip
    torch.manual_seed(0)
    result = bd.finetune(
        nn.Conv2d(3, 2, 1), recipe=recipe, train=Stripes(), val=Stripes(), run_dir=f"{tmp_path}/run", quiet=True
    )
    assert result.metrics["iou"] > 0.9
