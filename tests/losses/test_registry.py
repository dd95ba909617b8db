"""Losses of one's own: registered, checked against their fields, used from a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.losses import LOSSES, Loss, Losses, Outputs
from bidensify.losses.terms import BceLoss, KlLoss, L1Loss
from bidensify.recipe import load_recipe
from bidensify.tasks import SegmentationTask

README = Path(__file__).resolve().parents[2] / "recipes" / "README.md"


def recipe(tiny: ModuleType, losses: dict[str, Any]) -> Any:
    return load_recipe(tiny.recipe(stages=[{**tiny.STUDENT["stages"][1], "losses": losses}]))


def test_the_loss_of_the_readme(tiny: ModuleType) -> None:
    block = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    exec(block, {})
    stage = recipe(tiny, {"task": 1, "squared": {"weight": 0.5, "power": 4}}).stages[0]
    assert stage.distils
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    target = {"image": torch.zeros(2, 3, 4, 4), "mask": torch.zeros(2, 4, 4, dtype=torch.long)}
    terms = Losses(stage.terms, SegmentationTask(3))
    assert terms.factors == {"task": 1, "squared": 0.5}
    assert terms.values(s, target, t)[1] == pytest.approx(float(((s - t) ** 4).mean()), rel=1e-5)
    for given, message in (
        ({"squared": {"powr": 3}}, r"losses\.squared\.powr: unknown key; did you mean 'power'"),
        ({"squared": {"power": "x"}}, r"losses\.squared\.power: input should be a valid integer.*got 'x'"),
        ({"squard": 1}, r"losses\.squard: unknown key; did you mean 'squared'"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipe(tiny, given)


def test_registering() -> None:
    class Own(Loss):
        def value(self, outputs: Outputs, target: Any, task: Any) -> Tensor:
            return torch.zeros(())

    bd.register_loss("own")(Own)
    bd.register_loss("own")(Own)
    with pytest.warns(UserWarning, match="the loss 'own' is registered again"):
        bd.register_loss("own")(type("Newer", (Own,), {}))
    assert LOSSES["own"].__name__ == "Newer"
    for wrong in (lambda output: output, dict, 3):
        with pytest.raises(ConfigError, match=r"register_loss\('wrong'\): .* must be a sub-class"):
            bd.register_loss("wrong")(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no loss 'won'"):
        LOSSES["won"]


def test_bce_is_the_divergence_of_coins() -> None:
    s, t = torch.randn(2, 1, 4, 4), 2 * torch.randn(2, 1, 4, 4)
    p, q = (s / 2).sigmoid().double(), (t / 2).sigmoid().double()
    expected = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean() * 4
    found = BceLoss(temperature=2).value(Outputs(s, t), {}, SegmentationTaskOfOne())
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert float(BceLoss().value(Outputs(t, t), {}, SegmentationTaskOfOne())) == pytest.approx(0, abs=1e-6)
    # Two classes by a softmax and one logit by a sigmoid are the same distribution.
    two = [torch.cat([torch.zeros_like(x), x], 1) for x in (s, t)]
    kl = KlLoss(temperature=2).value(Outputs(*two), {}, SegmentationTask(2))
    assert float(found) == pytest.approx(float(kl), rel=1e-4)


def test_l1() -> None:
    s, t = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    assert float(L1Loss().value(Outputs(s, t), {}, SegmentationTask(2))) == pytest.approx(float((s - t).abs().mean()))


class SegmentationTaskOfOne(SegmentationTask):
    def __init__(self) -> None:
        super().__init__(2)

    def logits(self, output: Any, size: tuple[int, int] | None = None) -> Tensor:
        return output  # type: ignore[no-any-return]
