"""The float network quantized to int8 by others, to be timed beside packed ones: OpenVINO (NNCF) and ONNX Runtime."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["int8_variants"]

_SAMPLES = 8


def int8_variants(module: nn.Module, x: Tensor, threads: int) -> dict[str, Callable[[], Any]]:
    """Name -> call of each int8 runtime that is installed, on the input ``x`` and with ``threads`` threads.

    Post-training quantization with both libraries' defaults, calibrated on a few random inputs: the time does not depend
    on the values.
    """
    found: dict[str, Callable[[], Any]] = {}
    if _has("openvino") and _has("nncf"):
        found["openvino int8"] = _openvino(module, x, threads)
    if _has("onnxruntime") and _has("onnx") and _has("onnxscript"):
        found["onnxruntime int8"] = _onnxruntime(module, x, threads)
    return found


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _samples(x: Tensor) -> list[Any]:
    return [torch.randn(x.shape).numpy() for _ in range(_SAMPLES)]


def _openvino(module: nn.Module, x: Tensor, threads: int) -> Callable[[], Any]:
    ov: Any = importlib.import_module("openvino")
    nncf: Any = importlib.import_module("nncf")
    plain = x.contiguous().clone()
    with torch.no_grad():
        model = ov.convert_model(module, example_input=plain, input=[list(x.shape)])
    model = nncf.quantize(model, nncf.Dataset(_samples(x)), subset_size=_SAMPLES)
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(plain.numpy()))
    return lambda: request.infer()


def _onnxruntime(module: nn.Module, x: Tensor, threads: int) -> Callable[[], Any]:
    runtime: Any = importlib.import_module("onnxruntime")
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    samples = iter([{"x": value} for value in _samples(x)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(samples, None)

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        source, target = str(Path(folder) / "float.onnx"), str(Path(folder) / "int8.onnx")
        torch.onnx.export(module, (x.contiguous(),), source, input_names=["x"], dynamo=True)
        quantization.quantize_static(source, target, Reader(), per_channel=True)
        session = runtime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy()}
    return lambda: session.run(None, feed)
