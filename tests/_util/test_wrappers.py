from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bidensify._util.wrappers import unwrap
from bidensify.errors import ConfigError


def test_what_is_inside() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert unwrap(net) is net
    wrappers: list[Any] = [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ]
    assert all(unwrap(wrap(net)) is net for wrap in wrappers)
    average = torch.optim.swa_utils.AveragedModel(net)
    assert unwrap(average) is average.module
    net.module = nn.Identity()  # a part of that name makes no wrapper
    assert unwrap(net) is net


def test_timm_averages() -> None:
    timm = pytest.importorskip("timm.utils")
    net = nn.Conv2d(3, 4, 1)
    for average in (timm.ModelEmaV2(net), timm.ModelEmaV3(net)):
        assert unwrap(average) is average.module


def test_what_changes_the_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="the student is a ScriptModule: a scripted network"):
        unwrap(torch.jit.script(nn.Conv2d(3, 4, 1)), "the student")

    class FSDPModule:
        pass

    class FSDPConv2d(FSDPModule, nn.Conv2d):
        """As ``fully_shard`` makes it."""

    with pytest.raises(ConfigError, match="is a FSDPModule: .*before fully_shard"):
        unwrap(FSDPConv2d(3, 4, 1))
