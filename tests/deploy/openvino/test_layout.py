"""Between packed layers under OpenVINO: images are moved to NCHW and back only where something needs it."""

from __future__ import annotations

from pathlib import Path

import torch
from ir_tools import exported, moved
from runtimes import needs
from torch import Tensor, nn

from bidensify.nn import BiDenseConv2d

pytestmark = needs("openvino")


class Block(nn.Module):
    """Packed layers with squeeze-and-excitation, a sum, a concatenation and an activation of a constant between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BiDenseConv2d(3, 16, 3, padding=1)
        self.second = BiDenseConv2d(16, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.shift = nn.Parameter(torch.randn(1, 16, 1, 1))
        self.last = BiDenseConv2d(48, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(b.mean((2, 3), keepdim=True)))))
        c = torch.where(b * gate > self.shift, a, 2 * b)
        return self.last(torch.cat([c + a, torch.relu(a - self.shift), (b - 1).clamp(-1, 1)], 1))  # type: ignore[no-any-return]


class Planar(nn.Module):
    """What runs over rows, columns or channels of a packed layer's image, and a sum with an image of another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = BiDenseConv2d(3, 8, 3, padding=1), BiDenseConv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.first(x)
        rows, channels = a.mean(2, keepdim=True), a.amax(1, keepdim=True)
        b = self.last(torch.softmax(a, 1) + rows * channels + x[:, :1])
        return b, b.flatten(2) @ a.flatten(2).mT, b.sum((2, 3)), torch.cat([a, b], 2)


def test_no_image_is_moved_between_packed_layers(tmp_path: Path) -> None:
    network = exported(Block(), tmp_path / "net.xml")
    transposed = moved(network)
    images = [shape for shape in transposed if shape.count(1) < 2]
    # The image that comes in, and the one that leaves.
    assert images == [[2, 3, 12, 20], [2, 12, 20, 8]]
    assert len(transposed) <= 4
    assert sum(node.get_type_name() == "packed_layer" for node in network.get_ordered_ops()) == 3


def test_what_needs_another_order_keeps_it(tmp_path: Path) -> None:
    exported(Planar(), tmp_path / "net.xml")
