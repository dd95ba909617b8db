"""Optical flow and restoration: metrics, losses, sizes, and learning from labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.regression import MeanAbsolutePercentageError, MeanSquaredError

import bidensify as bd
from bidensify.data import DataInfo, DenseDataset, Sample, build_transforms
from bidensify.errors import ConfigError, DataError
from bidensify.recipe import load_recipe
from bidensify.tasks import DepthTask, FlowTask, RestorationTask, available_tasks, build_task, predict_image
from bidensify.train import evaluate


def test_flow_metrics_equal_numpy() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(0, 20, (2, 2, 6, 7))
    guess = truth + random.normal(0, 3, truth.shape)
    truth[0, :, :2] = np.nan
    metrics = FlowTask().metrics()
    metrics.update(torch.tensor(guess), {"flow": torch.tensor(truth)})
    epe, outliers = [], []
    for g, t in zip(guess, truth):
        error = np.sqrt(((g - t) ** 2).sum(0))
        known = np.isfinite(t).all(0)
        length = np.sqrt((t**2).sum(0))
        epe.append(error[known].mean())
        outliers.append(((error > 3) & (error / length > 0.05))[known].mean())
    assert metrics.compute() == pytest.approx({"epe": np.mean(epe), "outliers": np.mean(outliers)})


def test_flow_loss_of_a_list_whose_last_is_best() -> None:
    """RAFT returns every iteration's flow."""
    truth = torch.randn(1, 2, 4, 4)
    truth[0, 0, 0, 0] = torch.nan
    task = FlowTask(aux_weight=0.5)
    outputs = [(truth.nan_to_num() + n).requires_grad_() for n in (2.0, 1.0)]
    loss = task.loss(outputs, {"flow": truth})
    loss.backward()
    assert loss.item() == pytest.approx(2 * 1 + 0.5 * 2 * 2)
    assert torch.isfinite(outputs[0].grad).all()  # type: ignore[arg-type]
    assert torch.equal(task.predict(outputs), outputs[-1])
    assert task.loss_weight({"flow": truth}) == 15
    unknown = torch.full((1, 2, 4, 4), torch.inf)
    assert task.loss(outputs, {"flow": unknown}).item() == 0
    metrics = task.metrics()
    metrics.update(outputs, {"flow": unknown})
    with pytest.raises(DataError, match="no image had a pixel with a known flow"):
        metrics.compute()


def test_flow_grows_with_its_grid() -> None:
    flow = torch.ones(1, 2, 4, 8)
    task = FlowTask()
    assert task.predict(flow, (8, 32))[0, :, 3, 5].tolist() == [4, 2]
    # A letterboxed image of 20x40 in an input of 16x32 that is 8x16 on the network's grid.
    extent = torch.tensor([[16, 32, 16, 32]])
    back = task.restore(torch.ones(1, 2, 8, 16), extent, (20, 40))
    assert back[0, :, 10, 20].tolist() == [2.5, 2.5]
    padded = task.restore(torch.ones(1, 2, 16, 32), torch.tensor([[10, 32, 16, 32]]), (20, 32))
    assert padded[0, :, 10, 20].tolist() == [1, 2]


def test_restoration_equals_torchmetrics() -> None:
    torch.manual_seed(0)
    clean = torch.rand(3, 3, 24, 20)
    noisy = clean + 0.1 * torch.randn_like(clean)
    metrics = RestorationTask().metrics()
    metrics.update(noisy, {"target": clean})
    got = metrics.compute()
    shown = noisy.clamp(0, 1)
    psnr = np.mean([float(PeakSignalNoiseRatio(data_range=1.0)(s[None], c[None])) for s, c in zip(shown, clean)])
    ssim = float(StructuralSimilarityIndexMeasure(data_range=1.0)(shown.double(), clean.double()))
    assert got == pytest.approx({"psnr": psnr, "ssim": ssim}, rel=1e-5)
    same = RestorationTask().metrics()
    same.update(clean, {"target": clean})
    assert same.compute()["psnr"] == 100
    assert RestorationTask().loss({"reconstruction": noisy}, {"target": clean}).item() == pytest.approx(
        float((noisy - clean).abs().mean())
    )


def test_depth_metrics_equal_torchmetrics_where_it_has_them() -> None:
    torch.manual_seed(0)
    truth = torch.rand(1, 9, 11) * 8 + 1
    guess = truth * torch.exp(0.2 * torch.randn_like(truth))
    metrics = DepthTask(output="linear").metrics()
    metrics.update(guess[:, None], {"depth": truth})
    got = metrics.compute()
    p, g = guess.double(), truth.double()
    assert got["absrel"] == pytest.approx(float(MeanAbsolutePercentageError()(p, g)), rel=1e-6)
    assert got["rmse"] == pytest.approx(float(MeanSquaredError(squared=False)(p, g)), rel=1e-6)
    assert got["rmse_log"] == pytest.approx(float(MeanSquaredError(squared=False)(p.log(), g.log())), rel=1e-6)
    assert got["silog"] == pytest.approx(float((p.log() - g.log()).var(correction=0).sqrt()), rel=1e-6)


def test_pictures() -> None:
    flow = torch.zeros(2, 4, 5)
    flow[0] = 3
    assert FlowTask().picture(torch.zeros(3, 8, 10, dtype=torch.uint8), flow).shape == (3, 8, 10)
    assert FlowTask().picture(None, {"flow": torch.full((2, 4, 5), torch.nan)}).dtype == torch.uint8
    grey = RestorationTask().picture(None, torch.full((1, 4, 5), 0.5))
    assert torch.equal(grey, torch.full((3, 4, 5), 128, dtype=torch.uint8))
    # Grey, float and many-band images stand beside their pictures too.
    for image in (torch.zeros(1, 4, 5, dtype=torch.uint8), torch.rand(5, 4, 5)):
        assert RestorationTask().picture(image, torch.rand(3, 4, 5), blend=0.5).shape == (3, 4, 5)
    with pytest.raises(ConfigError, match="before normalisation"):
        RestorationTask().picture(torch.full((3, 4, 5), 2.0), torch.rand(3, 4, 5), blend=0.5)


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="3 channels.*'flow' needs 2"):
        FlowTask().predict(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="needs 'flow' in each sample"):
        FlowTask().loss(torch.zeros(1, 2, 4, 4), {"image": torch.zeros(1, 6, 4, 4)})
    with pytest.raises(ConfigError, match="needs 'target' in each sample"):
        RestorationTask().loss(torch.zeros(1, 3, 4, 4), {"image": torch.zeros(1, 3, 4, 4)})
    with pytest.raises(ConfigError, match="aux_weight is -1"):
        build_task("restoration", aux_weight=-1)


class Noisy(DenseDataset):
    """Smooth images under noise; their transforms work on image and target alike."""

    info = DataInfo(0, (), (), mean=(0.0,) * 3, std=(1.0,) * 3)

    def __len__(self) -> int:
        return 24

    def load(self, index: int) -> Sample:
        from torchvision import tv_tensors

        generator = torch.Generator().manual_seed(index)
        clean = nn.functional.interpolate(torch.rand(1, 3, 3, 3, generator=generator), (16, 24), mode="bilinear")[0]
        noisy = (clean + 0.15 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
        return {"image": tv_tensors.Image(noisy), "target": tv_tensors.Image(clean)}


def test_restoration_learns_through_a_run_and_predicts_at_any_size(tmp_path: object) -> None:
    transforms = build_transforms(True, (16, 16), (0, 0, 0), (1, 1, 1), scale=(1, 1), color_jitter=0)
    recipe = load_recipe({
        "name": "noisy", "data": {"batch_size": 4}, "task": {"name": "restoration"},
        "stages": [{"name": "a", "binarize": "none", "epochs": 40, "lr": 0.02}],
        "log": {"tensorboard": False}, "calibrate": {"batches": 0}, "evaluate": {"teacher": False},
    })  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    val = Noisy(build_transforms(False, (16, 24), (0, 0, 0), (1, 1, 1)))
    copy = RestorationTask().metrics()
    for index in range(len(val)):
        copy.update(val[index]["image"][None], {"target": val[index]["target"][None]})
    result = bd.finetune(model, recipe=recipe, train=Noisy(transforms), val=val, run_dir=f"{tmp_path}/run", quiet=True)
    assert result.metrics["psnr"] > copy.compute()["psnr"] + 2
    restored = predict_image(model, RestorationTask(), torch.rand(3, 30, 20), val.transforms)  # type: ignore[arg-type]
    assert restored.shape == (3, 30, 20)
    assert 0 <= restored.min() <= restored.max() <= 1


def test_tasks_register_themselves() -> None:
    assert {"binary", "depth", "flow", "multilabel", "restoration", "segmentation"} <= set(available_tasks())

    @bd.register_task("heights_of_this_test")
    class Heights(DepthTask):
        def __init__(self, scale: float = 2.0) -> None:
            super().__init__(output="linear")
            self.scale = scale

    assert build_task("heights_of_this_test", scale=3).scale == 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="has no option scael; its options are scale"):
        build_task("heights_of_this_test", scael=3)
    with pytest.warns(UserWarning, match="task 'heights_of_this_test' is registered again"):
        bd.register_task("heights_of_this_test")(FlowTask)
    assert isinstance(build_task("heights_of_this_test"), FlowTask)


class Frames(Noisy):
    """Pairs of frames without a label in training: the teacher's flow is all there is."""

    def __init__(self, labelled: bool) -> None:
        super().__init__()
        self.labelled = labelled

    def load(self, index: int) -> Sample:
        image = super().load(index)["image"].as_subclass(Tensor)
        pair = torch.cat([image, image.roll(1, -1)])
        return {"image": pair, "flow": Frames.teacher()(pair[None])[0].detach()} if self.labelled else {"image": pair}

    @staticmethod
    def teacher() -> nn.Conv2d:
        conv = nn.Conv2d(6, 2, 3, padding=1)
        with torch.no_grad():
            conv.weight.copy_(torch.linspace(-1, 1, conv.weight.numel()).view_as(conv.weight))
        return conv


@pytest.mark.parametrize("name", ["flow", "restoration"])
def test_distilling_to_the_teachers_output_alone(name: str, tmp_path: object) -> None:
    recipe = load_recipe({
        "name": name, "data": {"batch_size": 4}, "task": {"name": name}, "log": {"tensorboard": False},
        "stages": [{"name": "a", "binarize": "none", "epochs": 25, "lr": 0.05, "losses": {"task": None, "l1": 1}}],
        "calibrate": {"batches": 0},
    })  # fmt: skip
    torch.manual_seed(0)
    if name == "flow":
        train, val, teacher, student = Frames(False), Frames(True), Frames.teacher(), nn.Conv2d(6, 2, 3, padding=1)
    else:
        fit = build_transforms(False, (16, 24), (0, 0, 0), (1, 1, 1))
        train, val, teacher, student = Noisy(fit), Noisy(fit), nn.AvgPool2d(3, 1, 1), nn.Conv2d(3, 3, 3, padding=1)
    task = build_task(name)
    start = evaluate(student, task, val)
    result = bd.finetune(
        student, teacher=teacher, recipe=recipe, train=train, val=val, run_dir=f"{tmp_path}/run", quiet=True
    )
    if name == "flow":
        assert result.metrics["epe"] < 0.3 * start["epe"]
    else:
        assert result.metrics["psnr"] > start["psnr"] + 10


@pytest.mark.parametrize(
    ("name", "loss", "quoted"),
    [
        ("flow", "kl", "distribution over classes.*'flow' gives values; use bce, kd_l1 or l1"),
        ("multilabel", "kl", "'multilabel' gives labels"),
        ("flow", "bce", "probability per channel.*use kl"),
        ("flow", "cwd", "no score per class; name the layers"),
        ("flow", "kd_l1", "compares depths, and the task is 'flow'"),
        ("binary", "kl", "one channel"),
    ],
)
def test_losses_that_make_no_sense_are_refused_at_the_start(
    name: str, loss: str, quoted: str, tmp_path: object
) -> None:
    options = {"num_classes": 2} if name == "multilabel" else {}
    recipe = load_recipe({
        "name": name, "data": {"batch_size": 4}, "task": {"name": name, **options}, "calibrate": {"batches": 0},
        "stages": [{"name": "a", "binarize": "none", "epochs": 1, "lr": 0.05, "losses": {"task": None, loss: 1}}],
        "log": {"tensorboard": False},
    })  # fmt: skip
    channels = 1 if name == "binary" else 2
    nets = [nn.Conv2d(6, channels, 3, padding=1) for _ in range(2)]
    with pytest.raises(ConfigError, match=quoted):
        bd.finetune(
            nets[0], teacher=nets[1], recipe=recipe, train=Frames(True), val=Frames(True), run_dir=f"{tmp_path}/run", quiet=True
        )  # fmt: skip
