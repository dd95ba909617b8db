"""Networks of other runtimes beside packed ones: what they read is there as long as they are called."""

from __future__ import annotations

import gc
import sys
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bidensify.bench.int8 import openvino_call


class Tensor:
    """As OpenVINO's: it shares the array."""

    def __init__(self, array: Any, shared_memory: bool) -> None:
        assert shared_memory
        self.array = array


class Network:
    """As OpenVINO's compiled network and its request, which points to the tensor's memory and does not keep it."""

    def create_infer_request(self) -> Network:
        return self

    def set_input_tensor(self, tensor: Tensor) -> None:
        self.given = weakref.ref(tensor)

    def infer(self) -> dict[int, Any]:
        tensor = self.given()
        assert tensor is not None, "the input's memory is gone"
        return {0: np.maximum(tensor.array, 0)}


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_input_lives_as_long_as_the_call(order: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = ModuleType("openvino")
    openvino.Tensor = Tensor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    x = torch.randn(1, 3, 8, 8).contiguous(memory_format=order)
    wanted = x.relu()
    call = openvino_call(Network(), x)
    if order == torch.channels_last:
        del x
    gc.collect()
    assert torch.equal(torch.from_numpy(call()), wanted)
    if order == torch.contiguous_format:
        x.neg_()
        assert torch.equal(torch.from_numpy(call()), x.relu()), "it reads what the input holds then"
