"""Elementwise operators on group norms and attention, on which OpenVINO's CPU plugin crashes, run and give what they should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import settle
from runtimes import needs
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import BiDenseConv2d

pytestmark = needs("openvino")


def _heads(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).unflatten(2, (4, -1))


def _attention(x: Tensor) -> Tensor:
    q = _heads(x).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2)


def _products(x: Tensor, y: Tensor) -> Tensor:
    q, k, v = (_heads(value).transpose(1, 2) for value in (x, y, x + y))
    return (torch.softmax(q @ k.transpose(2, 3), -1) @ v).transpose(1, 2)


def _back(x: Tensor, like: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).reshape(like.shape)


# (a packed layer's image, a convolution's) -> an image of the same shape.
CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "residual": lambda x, y: F.group_norm(x, 4) + torch.relu(y),
    "residual around an activation": lambda x, y: F.group_norm(torch.relu(y), 4) + torch.relu(y),
    "gate per channel": lambda x, y: F.group_norm(x, 4) * torch.sigmoid(y.mean((2, 3), keepdim=True) + 1),
    "choice": lambda x, y: torch.where(y * 2 > y + 1, F.group_norm(x, 4), torch.relu(y)),
    "two norms": lambda x, y: F.group_norm(x, 4) + F.group_norm(y, 2) * torch.sigmoid(x),
    "on tokens": lambda x, y: (F.group_norm(x.flatten(2), 4) - torch.softmax(y, 1).flatten(2) * 2).reshape(x.shape),
    "gate per head": lambda x, y: _back(_attention(x) * torch.sigmoid(_heads(y)[..., :1]), x),
    "sum with heads": lambda x, y: _back(_attention(x) + (_heads(y)[..., :1] + _heads(y)[..., 1:2]), x),
    "gate per head of products": lambda x, y: _back(_products(x, y) * torch.sigmoid(_heads(y)[..., :1]), x),
}


class Around(nn.Module):
    """Cases beside one another between packed layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.plain = BiDenseConv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 1)
        self.last = BiDenseConv2d(16, 8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a, b = self.first(x), torch.softmax(self.plain(x), 1)
        return {f"{name}, {i}": y for name, case in CASES.items() for i, y in enumerate(self.one(case(a, b)))}

    def one(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, self.last(y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_reads_a_group_norm_or_attention_runs(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bd.pack(settle(Around()))
    done = bd.export(model, tmp_path / "net.xml", example_inputs=torch.randn(2, 3, 8, 12), dynamic=dynamic)
    assert done.runtime == "openvino"
    assert done.difference is not None
    assert done.difference < 1e-5
