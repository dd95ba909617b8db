from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bidensify.errors import ConfigError
from bidensify.losses import Losses, Outputs
from bidensify.losses.terms import (
    CwdLoss,
    KdL1Loss,
    KlLoss,
    TaskLoss,
    cwd_loss,
    depth_l1,
    feature_loss,
    kl_loss,
    loss_weight,
)
from bidensify.tasks import DepthTask, SegmentationTask


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), 2 * torch.randn(shape, generator=generator)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.floats(0.5, 6), st.booleans(), st.integers(0, 99))
def test_kl(n: int, c: int, size: int, temperature: float, ignore: bool, seed: int) -> None:
    s, t = pair((n, c, size, size + 1), seed)
    valid = torch.rand(n, size, size + 1, generator=torch.Generator().manual_seed(seed)) > 0.4 if ignore else None
    p, q = softmax(s.double().numpy() / temperature, 1), softmax(t.double().numpy() / temperature, 1)
    total, count = 0.0, 0
    for i, y, x in np.ndindex(n, size, size + 1):
        if valid is None or valid[i, y, x]:
            total += sum(q[i, k, y, x] * np.log(q[i, k, y, x] / p[i, k, y, x]) for k in range(c)) * temperature**2
            count += 1
    assert float(kl_loss(s, t, temperature, valid)) == pytest.approx(total / max(count, 1), rel=1e-4, abs=1e-5)


def test_kl_ignores_what_it_should() -> None:
    s, t = pair((1, 3, 4, 4))
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0] = False
    changed = s.clone()
    changed[:, :, 0] += 100 * torch.rand(3, 4)
    assert kl_loss(s, t, 1, valid) == kl_loss(changed, t, 1, valid)
    assert kl_loss(s, t, 1, torch.zeros_like(valid)) == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_kl_reads_masks_with_a_channel_as_it_reads_others(stride: int) -> None:
    task, loss = SegmentationTask(3), KlLoss(ignore=True)
    s, t = (x[..., ::stride, ::stride] for x in pair((4, 3, 8, 8)))
    mask = torch.randint(0, 3, (4, 8, 8))
    mask[0] = 255
    mask[1, :4] = 255
    plain, planed = ({"image": torch.zeros(4, 3, 8, 8), "mask": m} for m in (mask, mask[:, None]))
    assert loss.value(Outputs(s, t), planed, task) == loss.value(Outputs(s, t), plain, task)
    assert loss.value(Outputs(s, t), plain, task) == kl_loss(s, t, 1, mask[:, ::stride, ::stride] != 255)
    assert loss.count(planed, task) == loss.count(plain, task) == int((mask != 255).sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.floats(0.5, 6), st.integers(0, 99))
def test_cwd(n: int, c: int, size: int, temperature: float, seed: int) -> None:
    s, t = pair((n, c, size, size + 2), seed)
    total = 0.0
    for i, k in np.ndindex(n, c):
        p = softmax(s[i, k].double().numpy().ravel() / temperature, 0)
        q = softmax(t[i, k].double().numpy().ravel() / temperature, 0)
        total += float((q * np.log(q / p)).sum()) * temperature**2 / c / n
    assert float(cwd_loss(s, t, temperature)) == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_features() -> None:
    s, t = pair((2, 5, 3, 4))
    a, b = s.double().numpy(), t.double().numpy()
    mse = 0.0
    for i, y, x in np.ndindex(2, 3, 4):
        u, v = a[i, :, y, x], b[i, :, y, x]
        mse += (2 - 2 * u @ v / np.linalg.norm(u) / np.linalg.norm(v)) / 24
    assert float(feature_loss(s, t)) == pytest.approx(mse, rel=1e-5)
    attention = 0.0
    for i in range(2):
        u, v = (a[i] ** 2).sum(0).ravel(), (b[i] ** 2).sum(0).ravel()
        attention += ((u / np.linalg.norm(u) - v / np.linalg.norm(v)) ** 2).sum() / 2
    assert float(feature_loss(s, t, "attention")) == pytest.approx(attention, rel=1e-5)
    assert float(feature_loss(3 * t, t)) == pytest.approx(0, abs=1e-6)


def test_depth_l1() -> None:
    s, t = torch.rand(2, 4, 4) + 0.1, torch.rand(2, 4, 4) + 0.1
    a, b = s.double().numpy(), t.double().numpy()
    assert float(depth_l1(s, t)) == pytest.approx(np.abs(np.log(a) - np.log(b)).mean(), rel=1e-5)
    assert float(depth_l1(s, t, log=False)) == pytest.approx(np.abs(a - b).mean(), rel=1e-5)


def test_gradients_reach_the_student_alone() -> None:
    for loss in (kl_loss, cwd_loss, feature_loss):
        s, t = pair((2, 3, 4, 4))
        s.requires_grad_()
        loss(s, t).backward()
        assert s.grad is not None
        assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
def test_parts_add_up_to_the_whole(weights: tuple[float, ...] | None, cut: int) -> None:
    """Means over parts, weighted, are the mean over the batch: what several processes and accumulation rely on."""
    task = SegmentationTask(3, class_weights=weights)
    losses = Losses({"task": TaskLoss(), "kl": KlLoss(ignore=True, temperature=2), "cwd": CwdLoss()}, task)
    s, t = pair((4, 3, 6, 6))
    mask = torch.randint(0, 3, (4, 6, 6))
    mask[0] = 255
    mask[1, :4] = 255
    target = {"image": torch.zeros(4, 3, 6, 6), "mask": mask}
    whole = torch.stack(losses.values(s, target, t))
    parts = []
    for chunk in (slice(0, cut), slice(cut, 4)):
        part = {key: value[chunk] for key, value in target.items()}
        parts.append((losses.weights(part), torch.stack(losses.values(s[chunk], part, t[chunk]))))
    total = sum(w for w, _ in parts)
    assert torch.allclose(sum(w * v for w, v in parts) / total, whole.double(), rtol=1e-5)


def test_depth_parts_add_up_to_the_whole() -> None:
    task = DepthTask(min_depth=0.1, max_depth=10)
    losses = Losses({"task": TaskLoss(), "kd_l1": KdL1Loss()}, task)
    s, t = pair((3, 1, 4, 4))
    depth = torch.rand(3, 4, 4) + 0.5
    depth[0] = 0
    depth[1, 0] = 50
    target = {"image": torch.zeros(3, 3, 4, 4), "depth": depth}
    whole = torch.stack(losses.values(s, target, t))
    parts = []
    for chunk in (slice(0, 2), slice(2, 3)):
        part = {key: value[chunk] for key, value in target.items()}
        parts.append((losses.weights(part), torch.stack(losses.values(s[chunk], part, t[chunk]))))
    total = sum(w for w, _ in parts)
    assert torch.allclose(sum(w * v for w, v in parts) / total, whole.double(), rtol=1e-5)


def test_a_task_may_give_its_own_weight(tiny: ModuleType) -> None:
    class Own(SegmentationTask):
        def loss_weight(self, target: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.tensor(7.0)

    assert loss_weight(Own(3), {"mask": torch.zeros(1, 2, 2)}) == 7


def test_other_tasks_are_means_over_images() -> None:
    assert loss_weight(object(), {"image": torch.zeros(5, 3, 2, 2), "flow": torch.zeros(5, 2, 2, 2)}) == 5


def test_shapes_that_differ_are_an_error() -> None:
    losses = Losses({"kl": KlLoss()}, SegmentationTask(3))
    target = {"image": torch.zeros(1, 3, 4, 4), "mask": torch.zeros(1, 4, 4, dtype=torch.long)}
    with pytest.raises(ConfigError, match=r"losses\.kl: student gives \(1, 3, 4, 4\), teacher \(1, 3, 2, 2\)"):
        losses.values(torch.zeros(1, 3, 4, 4), target, torch.zeros(1, 3, 2, 2))
