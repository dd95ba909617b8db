"""The suite's rows: what is stored and read again, and what its tables say. Nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import suite


def row(network: str, **ms: float) -> dict[str, Any]:
    times = {key.replace("_", " "): value for key, value in ms.items()}
    return {"network": network, "kind": "cnn", "linear": "pointwise", "size": [192, 256], "threads": 1, "ms": times}


def test_rows_are_kept_and_replaced_by_what_they_measure(tmp_path: Path) -> None:
    file = tmp_path / "results" / "suite.json"
    assert suite.read(file) == {}
    for each in (row("a", float=4.0), row("b", float=3.0), row("a", float=5.0)):
        suite.store(file, each)
    kept = suite.read(file)
    assert [value["ms"]["float"] for value in kept.values()] == [5.0, 3.0]
    assert suite.key_of(row("a")) in kept


def test_tables_take_the_better_packed_and_name_what_is_slower_than_int8() -> None:
    rows = [
        row("fast", float=80.0, openvino_int8=20.0, packed=20.0, packed_compiled=10.0),
        row("slow", float=20.0, openvino_int8=5.0, packed=10.0),
        row("alone", float=20.0),
    ]
    text = suite.render(rows)
    assert "| 2.00 | 8.00 | compiled |" in text
    assert "| 0.50 | 2.00 | eager |" in text
    assert "Geometric means: 1.00 times OpenVINO int8, 4.00 times float PyTorch." in text
    assert "Slower than int8: slow at 192×256 (0.50)." in text


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"out": x, "aux": x + 1}, lambda x: [(x,), x + 1]])
def test_the_first_output(wrap: Any) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return wrap(x)

    x = torch.randn(2, 3)
    assert torch.equal(suite.First(Net())(x), x)


def test_the_list_holds_what_it_promises() -> None:
    assert len(suite.NETWORKS) >= 12
    assert {kind for kind, _, _ in suite.NETWORKS.values()} == {"cnn", "transformer"}
