from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bidensify as bd
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


def test_a_wrapped_network_is_the_network_all_the_way(tmp_path: Path) -> None:
    net = nn.Sequential(*[nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8), (8, 2))]).eval()
    wrapped = nn.DataParallel(net)
    student, plain = bd.bidensify(wrapped), bd.bidensify(net)
    assert list(student.state_dict()) == list(plain.state_dict())
    assert [layer.path for layer in bd.plan(wrapped).layers] == [layer.path for layer in bd.plan(net).layers]
    counts = [str(bd.summary(model, (3, 8, 8)).to_dict()) for model in (nn.DataParallel(plain), plain)]
    assert counts[0] == counts[1]
    x = torch.randn(2, 3, 8, 8)
    for model in (student, bd.pack(torch.compile(student, backend="eager"))):
        bd.save_pretrained(nn.DataParallel(model), tmp_path)
        for base in (net, wrapped):
            again = bd.from_pretrained(tmp_path, base)
            assert not isinstance(again, nn.DataParallel)
            with torch.no_grad():
                assert torch.equal(again(x), model.eval()(x))
