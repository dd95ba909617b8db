"""What a .pte takes of memory: tensors share the arena without touching one another, and convolutions keep no pointers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import needs
from torch import nn

import bidensify as bd
from bidensify.deploy.executorch.memory import tight
from bidensify.nn import BiDenseConv2d

pytestmark = needs("executorch")


@dataclass(eq=False)
class Spec:
    """As much of ExecuTorch's TensorSpec as planning reads."""

    size: int
    lifetime: tuple[int, int]
    mem_id: int | None = None
    storage_base: Any = None
    allocated_memory: int = 0

    def realign(self, alignment: int) -> None:
        self.allocated_memory = -(-self.size // alignment) * alignment


def test_tensors_that_live_together_lie_apart() -> None:
    draw = random.Random(0)
    for _ in range(50):
        specs = set()
        for _ in range(draw.randint(1, 40)):
            first = draw.randint(0, 30)
            specs.add(Spec(draw.randint(0, 500), (first, first + draw.randint(0, 9)), draw.choice((None, 1, 2))))
        made = tight(16, specs, None, None)
        places = [(spec, made.spec_dict[spec]) for spec in specs]
        for i, (a, at) in enumerate(places):
            assert at.mem_offset % 16 == 0
            assert at.mem_offset + a.size <= made.bufsizes[at.mem_id]
            for b, other in places[:i]:
                together = a.lifetime[0] <= b.lifetime[1] and b.lifetime[0] <= a.lifetime[1]
                apart = at.mem_offset + a.size <= other.mem_offset or other.mem_offset + b.size <= at.mem_offset
                assert apart or not together or at.mem_id != other.mem_id


def test_a_gap_is_not_bound_to_the_tensor_that_made_it() -> None:
    # Two that meet, a larger one behind them, and one beside all.
    specs = {Spec(160, (0, 1)), Spec(160, (1, 2)), Spec(320, (3, 4)), Spec(16, (0, 4))}
    assert tight(16, specs, None, None).bufsizes == [0, 336]


def test_convolutions_keep_no_pointers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch.backends.xnnpack import xnnpack_preprocess

    kinds = []
    write = xnnpack_preprocess.serialize_xnnpack_binary

    def spy(graph: Any, data: Any) -> Any:
        kinds.extend((type(node.xnode_union).__name__, getattr(node.xnode_union, "flags", 0)) for node in graph.xnodes)
        return write(graph, data)

    monkeypatch.setattr(xnnpack_preprocess, "serialize_xnnpack_binary", spy)
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16))
    model = bd.pack(nn.Sequential(stem, BiDenseConv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 3, padding=1)).eval())
    images = [torch.randn(1, 3, 32, 48) for _ in range(2)]
    for rest in (None, images):
        done = bd.export(model, tmp_path / "net.pte", example_inputs=images[0], int8_rest=rest)
        assert done.difference is not None
        assert done.difference < (0.3 if rest else 1e-5)
    assert xnnpack_preprocess.serialize_xnnpack_binary is spy
    convolutions = [flags for kind, flags in kinds if kind == "XNNConv2d"]
    assert len(convolutions) == 4
    assert all(flags & 0x20 for flags in convolutions)
