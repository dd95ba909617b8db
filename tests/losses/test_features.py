from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

from bidensify.errors import ConfigError
from bidensify.losses.features import Features


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_records_and_removes_its_hooks(tiny: ModuleType) -> None:
    model = tiny.network()
    x = torch.rand(1, 3, 8, 8)
    with Features(model, ["1", "*.conv"]) as features:
        assert hooks(model) == 3
        model(x)
        assert torch.equal(features["1"], model[1](model[0](x)))
        assert features.paths(["*.conv"]) == ["1.conv", "2.conv"]
    assert hooks(model) == 0


def test_hooks_go_after_an_error(tiny: ModuleType) -> None:
    model = tiny.network()
    with pytest.raises(RuntimeError, match="stop"), Features(model, ["1"]):
        raise RuntimeError("stop")
    assert hooks(model) == 0


def test_unknown_layer_names_the_near_one(tiny: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"'1\.cnv' matches nothing in the student; did you mean '1\.conv'"):
        Features(tiny.network(), ["1.cnv"], "student")


def test_layer_that_does_not_run_or_gives_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    model = nn.ModuleDict({"pair": Pair(), "idle": nn.Identity()})
    with Features(model, ["idle"], "teacher") as features, pytest.raises(ConfigError, match="was not called"):
        features["idle"]
    with Features(model, ["pair"]), pytest.raises(ConfigError, match="gives tuple, not one tensor"):
        model["pair"](torch.zeros(1))


def test_what_comes_behind_may_work_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    x = torch.randn(1, 3, 6, 6)
    with Features(model, ["1"]) as features:
        model(x)
        assert torch.equal(features["1"], model[1](model[0](x)))
