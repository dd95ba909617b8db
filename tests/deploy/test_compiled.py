"""``bidensify.compile``: single packed layers give the same bits, networks the same to rounding, and stay what they were."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import bidensify as bd
from bidensify._util.machine import has_compiler
from bidensify.deploy.between import compiled
from bidensify.errors import PackError
from bidensify.nn import BiDenseConv2d

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


def small() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*body, nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 5, 1))


@needs_compiler
def test_a_layer_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    layer = BiDenseConv2d(24, 40, 3, padding=1).eval()
    eager, fast = bd.pack(layer), bd.pack(layer, compile=True)
    x = torch.randn(1, 24, 12, 18)
    assert torch.equal(fast(x), eager(x))


@needs_compiler
def test_a_network_is_equal_to_rounding_at_every_size_and_keeps_itself(tmp_path: Path) -> None:
    student = bd.bidensify(small(), example_inputs=torch.zeros(1, 3, 32, 32)).eval()
    eager, fast = bd.pack(student), bd.pack(student)
    assert bd.compile(fast, dynamic=True) is fast
    assert compiled.compiled(fast)
    assert type(fast) is type(eager)
    for size in ((32, 48), (40, 24)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(fast(x), eager(x), rtol=1e-4, atol=1e-4)
    x = torch.randn(1, 3, 32, 32)
    # A copy and a file are of the network, not of what was compiled.
    other = copy.deepcopy(fast)
    assert not compiled.compiled(other)
    assert torch.equal(other(x), eager(x))
    bd.save_pretrained(fast, tmp_path / "packed")
    assert torch.equal(bd.from_pretrained(tmp_path / "packed", model=small())(x), eager(x))


def test_what_is_not_packed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PackError, match="Sequential is not packed"):
        bd.compile(small())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PackError, match="needs a C\\+\\+ compiler"):
        bd.compile(bd.pack(BiDenseConv2d(8, 8, 1).eval()))
