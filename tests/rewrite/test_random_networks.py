"""Networks that nobody tried: random ones keep what every rewrite keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from invariants import CHECKS, examine
from random_networks import random_graph, random_network
from torch import Tensor, nn

# A sample that takes seconds; any other seed is as good (see ``invariants.examine``).
CAPTURED = ("compile", "export")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [random_network, random_graph])
def test_random(make: Callable[[int], tuple[nn.Module, tuple[Tensor, ...]]], seed: int) -> None:
    examine(*make(seed), without=CAPTURED)


def test_random_capture() -> None:
    examine(*random_graph(100), without=tuple(name for name in CHECKS if name not in CAPTURED))
