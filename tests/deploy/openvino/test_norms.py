"""Norms over an image's channels, as OpenVINO gets them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import settle
from runtimes import needs
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy.openvino.norms import as_rows, taken_to_pieces
from bidensify.nn import BiDenseConv2d

pytestmark = needs("openvino", "nncf")
ov: Any = pytest.importorskip("openvino")
ops: Any = importlib.import_module("openvino.opset13")


def norm(shape: list[int], axes: list[int], eps_mode: str = "INSIDE_SQRT") -> Any:
    x = ops.parameter(shape, np.float32, name="x")
    node = ops.mvn(x, np.array(axes, np.int64), True, 1e-6, eps_mode)
    return ov.Model([node.output(0)], [x], "norm")


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def the_norm(model: Any) -> Any:
    return next(node for node in model.get_ordered_ops() if node.get_type_name() == "MVN")


@pytest.mark.parametrize("shape", [[2, 5, 7, 12], [1, -1, -1, 12], [-1, 3, 4, 12], [1, 2, 3, 4, 12]])
@pytest.mark.parametrize("axes", [[-1], [3]])
@pytest.mark.parametrize("eps_mode", ["INSIDE_SQRT", "OUTSIDE_SQRT"])
def test_a_norm_over_channels_is_one_over_rows(shape: list[int], axes: list[int], eps_mode: str) -> None:
    if axes == [3] and len(shape) == 5:
        axes = [4]
    model = norm(shape, axes, eps_mode)
    as_rows(model)
    assert len(the_norm(model).input_value(0).get_partial_shape()) == 3
    assert not taken_to_pieces(the_norm(model))
    size = [3 if n < 0 else n for n in shape]
    x = np.random.default_rng(0).normal(2.0, 3.0, size).astype(np.float32)
    found = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]
    variance = x.astype(np.float64).var(-1, keepdims=True)
    scale = np.sqrt(variance + 1e-6) if eps_mode == "INSIDE_SQRT" else np.sqrt(variance) + 1e-6
    np.testing.assert_allclose(found, (x - x.mean(-1, keepdims=True)) / scale, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [([2, 5, 7, 12], [2, 3]), ([2, 5, 7, 12], [1, 2, 3]), ([2, 5, 12], [2]), ([2, 12], [1]), ([2, 5, 7, -1], [3])],
)
def test_other_norms_stay(shape: list[int], axes: list[int]) -> None:
    model = norm(shape, axes)
    before = kinds(model)
    as_rows(model)
    assert kinds(model) == before


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ([12], [0]), ([2, 12], [1]), ([2, 5, 12], [2]), ([2, 5, 12], [1, 2]), ([2, 5, 7, 12], [2, 3]), ([2, 5, 7, 12], [3]),
        ([2, 5, 7, 12], [1]), ([2, 5, 7, 12], [1, 2, 3]), ([2, 5, 7, 8, 9], [2, 3, 4]), ([2, 5, 7, 8, 9], [4]),
    ],
)  # fmt: skip
def test_what_is_taken_to_pieces_is_what_openvino_takes(shape: list[int], axes: list[int]) -> None:
    model = norm(shape, axes)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    whole = any(node.get_rt_info()["layerType"] == "MVN" for node in compiled.get_ordered_ops())
    assert taken_to_pieces(the_norm(model)) is not whole


class Tokens(nn.Module):
    """Packed layers with a norm over channels behind each, and a pooled convolution behind all."""

    def __init__(self, length: int = 24) -> None:
        super().__init__()
        self.stem, self.pooled = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.layers = nn.ModuleList(BiDenseConv2d(8, 8, 1) for _ in range(length))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(length))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for layer, normed in zip(self.layers, self.norms):
            y = normed(layer(y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(y + self.pooled(y.mean((2, 3), keepdim=True)))


# Rounding in the stem turns a few bits of the next layer, and each layer more of the next: 24 layers of random
# weights are 0.05 to 0.2 off in int8 with the processor (other values altogether would be 1.4 off).
@pytest.mark.parametrize(("length", "far"), [(2, 0.1), (24, 0.5)])
def test_norms_between_packed_layers_compile_in_int8(tmp_path: Path, length: int, far: float) -> None:
    """OpenVINO walked back along 4 to the power of `length` paths from the quantization before the pooled convolution."""
    model = bd.pack(settle(Tokens(length)))
    images = [torch.randn(1, 3, 16, 16) for _ in range(2)]
    done = bd.export(model, tmp_path / "net.xml", example_inputs=images[0], int8_rest=images)
    assert done.difference is not None
    assert done.difference < far
