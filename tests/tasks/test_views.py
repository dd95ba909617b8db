"""Windows, mirror images and scales against the same by hand; one look alone is the whole image to the bit."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.tasks import DepthTask, FlowTask, MultiLabelTask, SegmentationTask, Views, paper_columns
from bidensify.train import evaluate


class Net(nn.Module):
    """Half the resolution, and not the same for the mirror image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, channels, 3, padding=1)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape[-2:]))
        return self.b(self.a(x).relu())


IMAGE = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def test_one_window_that_covers_the_image_is_the_whole_image(tiny: ModuleType) -> None:
    model, task = Net(3).eval(), SegmentationTask(3)
    for window in ((24, 40), (64, 64)):
        output = Views(window=window)(model, task, IMAGE)
        assert torch.equal(output, model(IMAGE))
    plain = evaluate(tiny.network(), tiny.TASK, tiny.Colours(6, seed=1))
    covered = evaluate(tiny.network(), tiny.TASK, tiny.Colours(6, seed=1), views=Views(window=(16, 16), stride=(4, 4)))
    assert covered == plain
    slid = evaluate(tiny.network(), tiny.TASK, tiny.Colours(6, seed=1), views=Views(window=(8, 8)))
    assert slid != plain


@pytest.mark.parametrize(("channels", "task"), [(3, SegmentationTask(3)), (2, MultiLabelTask(2)), (1, DepthTask())])
def test_windows_are_averaged_where_they_overlap(channels: int, task: SegmentationTask) -> None:
    model = Net(channels).eval()
    with torch.no_grad():
        got = Views(window=(16, 16), stride=(16, 12))(model, task, IMAGE)
        total, count = torch.zeros_like(got), torch.zeros(24, 40)
        for top in (0, 8):  # the last window ends with the image
            for left in (0, 12, 24):
                raw = nn.functional.interpolate(
                    model(IMAGE[..., top : top + 16, left : left + 16]), (16, 16), mode="bilinear"
                )
                mean = {3: raw.softmax(1), 2: raw.sigmoid(), 1: raw}[channels]
                total[..., top : top + 16, left : left + 16] += mean
                count[top : top + 16, left : left + 16] += 1
    assert count.min() >= 1
    wanted = total / count
    read = {3: got.softmax(1), 2: got.sigmoid(), 1: got}[channels]
    assert torch.allclose(read, wanted, atol=1e-5)
    assert task.predict(got).shape[-2:] == (24, 40)


def test_mirror_and_scales() -> None:
    model, task = Net(3).eval(), SegmentationTask(3)
    with torch.no_grad():
        got = Views(flip=True, scales=(1.0, 1.5), multiple=8)(model, task, IMAGE)
        assert model.sizes == [(24, 40), (24, 40), (40, 64), (40, 64)]  # 36 and 60, rounded up
        looks = []
        for size in ((24, 40), (40, 64)):
            scaled = (
                nn.functional.interpolate(IMAGE, size, mode="bilinear", antialias=True) if size != (24, 40) else IMAGE
            )
            for axis in ((), (-1,)):
                raw = nn.functional.interpolate(model(scaled.flip(axis)), size, mode="bilinear").softmax(1).flip(axis)
                looks.append(nn.functional.interpolate(raw, (24, 40), mode="bilinear"))
    assert torch.allclose(got.softmax(1), torch.stack(looks).mean(0), atol=1e-5)
    # A network that looks the same in the mirror gains nothing.
    blind = nn.Conv2d(3, 3, 1)
    assert torch.allclose(Views(flip=True)(blind, task, IMAGE).softmax(1), blind(IMAGE).softmax(1), atol=1e-6)


def test_a_task_of_ones_own_is_averaged_as_what_it_says_its_outputs_are() -> None:
    class Own:
        """No ``DenseTask``; all else is as in one."""

        outputs = "classes"

        def __getattr__(self, name: str) -> Any:
            return getattr(SegmentationTask(3), name)

    model = Net(3).eval()
    with torch.no_grad():
        got = Views(flip=True, multiple=8)(model, Own(), IMAGE)
        wanted = Views(flip=True, multiple=8)(model, SegmentationTask(3), IMAGE)
    assert torch.equal(got, wanted)


def test_what_cannot_be_averaged_is_told() -> None:
    with pytest.raises(ConfigError, match=r"stride=\[4, 4\] without evaluate.window"):
        Views(stride=(4, 4))
    with pytest.raises(ConfigError, match="the stride's width lies between 1 and the window's"):
        Views(window=(8, 8), stride=(8, 9))
    with pytest.raises(ConfigError, match="different numbers above 0"):
        Views(scales=(1.0, 1.0))
    with pytest.raises(ConfigError, match="other depths"):
        Views(scales=(0.5, 1.0))(Net(1), DepthTask(), IMAGE)
    with pytest.raises(ConfigError, match="a flow points elsewhere"):
        Views(flip=True)(Net(2), FlowTask(), IMAGE)


def test_the_columns_of_papers() -> None:
    found = paper_columns({"miou": 0.18754, "pixel_accuracy": 0.6725, "iou/wall": 0.5}, params=1_626_400, ops=5.372e9)
    assert found == {"Params (K)": 1626.4, "OPs (G)": 5.37, "pixAcc (%)": 67.25, "mIoU (%)": 18.75}
    depth = dict.fromkeys(("delta1", "delta2", "delta3", "absrel", "rmse", "log10", "rmse_log", "sqrel"), 0.71249)
    assert list(paper_columns(depth)) == ["δ1", "δ2", "δ3", "AbsRel", "RMSE", "log10", "RMSE log"]
    assert paper_columns({"psnr": 30.123456}) == {"psnr": 30.1235}
