"""Networks of other runtimes beside packed ones: what they read is there as long as they are called."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bidensify.bench import int8
from bidensify.bench.int8 import OneByOne, int8_file, openvino_call, quantize_int8


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


def test_images_of_a_batch_one_by_one() -> None:
    """Each has its own output, though the runtime writes all of them to one place."""
    place = np.zeros((1, 3, 4, 5), np.float32)

    def opened(x: torch.Tensor) -> Any:
        def call() -> Any:
            np.maximum(x.numpy(), 0, out=place)
            return place

        return call

    images = torch.randn(3, 3, 4, 5)
    network = OneByOne(opened, (1, 3, 4, 5))
    assert torch.equal(network(images), images.relu())
    assert torch.equal(network(images[:1]), images[:1].relu())


def test_a_file_of_another_network_shape_or_samples_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []

    def quantize(module: nn.Module, x: Any, target: Path, arrays: Any) -> None:
        made.append(module)
        target.write_text(str(len(made)))

    monkeypatch.setattr(int8, "_quantize_openvino", quantize)
    x, samples = torch.zeros(1, 3, 8, 8), [torch.ones(1, 3, 8, 8)]
    first, retrained, strided = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2)
    strided.load_state_dict(first.state_dict())
    cases: list[tuple[Any, ...]] = [
        (first, x),
        (retrained, x),
        (strided, x),
        (first, torch.zeros(1, 3, 16, 16)),
        (first, x, samples),
        (first, x, [2 * samples[0]]),
    ]
    for number, (module, given, *more) in enumerate(cases, 1):
        for _ in range(2):
            file = quantize_int8("openvino int8", module, given, tmp_path, *more)
            assert len(made) == number
            assert file.read_text() == str(number)
    assert int8_file("openvino int8", tmp_path) == file
    assert len(made) == len(cases)


def test_one_that_was_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(module: nn.Module, x: Any, target: Path, arrays: Any) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(int8, "_quantize_openvino", cut)
    x, network = torch.zeros(1, 3, 8, 8), nn.Conv2d(3, 4, 3)
    with pytest.raises(KeyboardInterrupt):
        quantize_int8("openvino int8", network, x, tmp_path)
    monkeypatch.setattr(int8, "_quantize_openvino", lambda module, x, target, arrays: target.write_text("whole"))
    assert quantize_int8("openvino int8", network, x, tmp_path).read_text() == "whole"
