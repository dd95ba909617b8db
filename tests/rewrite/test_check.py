"""The check behind a rewrite: what depends on the data may differ, everything else may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import CheckError
from bidensify.rewrite.check import _same, on_other_values
from bidensify.rewrite.record.recorded import specs
from bidensify.rewrite.record.recorder import record


class Points(nn.Module):
    """As many points as values above a threshold: sizes depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.head(torch.relu(self.a(torch.relu(self.stem(x)))))
        return {"points": (y[:, 0] > 0).nonzero(), "map": y}


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_sizes_that_depend_on_the_data_may_differ() -> None:
    model = Points()
    student = bd.bidensify(model, example_inputs=X)
    assert len(student.bidensify_plan.binary) == 1
    assert student(X)["points"].shape[1] == 3
    recorded = record(model, X)
    assert on_other_values(model, recorded)["points"].shape != recorded.output["points"].shape


def test_in_place_the_message_says_the_way_out() -> None:
    with pytest.raises(CheckError, match="depend on the data and should differ, convert with verify=False"):
        bd.bidensify(Points(), example_inputs=X, inplace=True)
    assert bd.bidensify(Points(), example_inputs=X, inplace=True, verify=False) is not None


@pytest.mark.parametrize(
    ("got", "wanted", "varying", "same"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), True),
        (torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(4, 3), True),
        (torch.zeros(5, 4), torch.zeros(2, 3), torch.zeros(4, 3), False),
        (torch.zeros(5, 3), torch.zeros(2, 3), torch.zeros(2, 3), False),
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3), torch.zeros(4, 3), False),
        (torch.zeros(2, 3, 1), torch.zeros(2, 3), torch.zeros(4, 3), False),
        ([torch.zeros(5)], [torch.zeros(2), torch.zeros(1)], [torch.zeros(2)], True),
        ([torch.zeros(5)], [torch.zeros(2), torch.zeros(1)], [torch.zeros(2), torch.zeros(1)], False),
        ({"a": torch.zeros(5)}, {"b": torch.zeros(5)}, {"b": torch.zeros(5)}, False),
        ({"a": torch.zeros(5), "n": 3}, {"a": torch.zeros(5), "n": 4}, {"a": torch.zeros(5), "n": 5}, True),
        ({"a": torch.zeros(5), "n": 3}, {"a": torch.zeros(5), "n": 4}, {"a": torch.zeros(5), "n": 4}, False),
        (None, torch.zeros(1), torch.zeros(2), False),
    ],
)
def test_structures(got: Any, wanted: Any, varying: Any, same: bool) -> None:
    assert _same(specs(got), specs(wanted), specs(varying)) is same
