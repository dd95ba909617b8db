"""The float network quantized to int8 by others, to be timed beside packed ones: OpenVINO (NNCF) and ONNX Runtime."""

from __future__ import annotations

import hashlib
import importlib.util
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify._util.fingerprint import weights_fingerprint
from bidensify._util.terminal import off_standard_output
from bidensify.rewrite.plan.times import geometry_of

__all__ = [
    "OneByOne",
    "installed_runtimes",
    "int8_file",
    "open_int8",
    "open_openvino",
    "openvino_call",
    "openvino_layer_times",
    "quantize_int8",
]

_SAMPLES = 8
_NEEDS = {
    "openvino int8": ("openvino", "nncf"),
    "onnxruntime int8": ("onnxruntime", "onnx", "onnxscript"),
}
_LAYERS = {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"}
_FILES = {"openvino int8": "openvino_int8.xml", "onnxruntime int8": "onnxruntime_int8.onnx"}


def installed_runtimes() -> list[str]:
    """Names of the int8 variants whose packages are installed."""
    return [name for name, needs in _NEEDS.items() if all(importlib.util.find_spec(need) for need in needs)]


def int8_file(name: str, folder: Path) -> Path:
    """Where ``quantize_int8`` writes the network of a runtime."""
    return folder / _FILES[name]


def quantize_int8(
    name: str, module: nn.Module, x: Tensor, folder: Path, samples: Sequence[Tensor] | None = None
) -> Path:
    """Post-training quantization with the library's defaults.

    Args:
        name: one of ``installed_runtimes()``.
        module: a float network in evaluation mode.
        x: an input of the shape to be timed.
        folder: where the network goes; one that is there is taken if it was made of this network, with its weights, for this
            shape and from these samples, else it is made again.
        samples: inputs of the shape of ``x`` to calibrate on; by default a few random ones (the time does not depend on the
            values, the accuracy does).

    Returns:
        The file of the quantized network.
    """
    target = int8_file(name, folder)
    made_of, key = target.with_suffix(".key"), _key(module, x, samples)
    if not (target.exists() and made_of.is_file() and made_of.read_text(encoding="utf-8") == key):
        folder.mkdir(parents=True, exist_ok=True)
        made_of.unlink(missing_ok=True)
        given = samples or [torch.randn(x.shape) for _ in range(_SAMPLES)]
        arrays = [sample.contiguous().numpy() for sample in given]
        # NNCF's bars and torch.onnx's steps.
        with off_standard_output():
            (_quantize_openvino if name == "openvino int8" else _quantize_onnxruntime)(module, x, target, arrays)
        with atomic_write(made_of) as temporary:
            temporary.write_text(key, encoding="utf-8")
    return target


def _key(module: nn.Module, x: Tensor, samples: Sequence[Tensor] | None) -> str:
    """What tells one quantized network from another."""
    digest = hashlib.sha256(f"{module!r}\0{weights_fingerprint(module)}\0{tuple(x.shape)}".encode())
    for sample in samples or ():
        digest.update(f"{tuple(sample.shape)}\0".encode())
        digest.update(sample.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_openvino(file: str | Path, x: Tensor, threads: int, precision: str | None = None) -> Callable[[], Any]:
    """A call that runs an OpenVINO file on what ``x`` then holds, one image at a time; it returns the first output.

    Args:
        file: an .xml of one input.
        x: an input; a copy in the usual memory format is read where it has another.
        threads: of the runtime.
        precision: "f32" or "bf16" for what is no int8; by default bfloat16 where the processor has it.
    """
    ov: Any = importlib.import_module("openvino")
    more = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    return openvino_call(ov.Core().compile_model(str(file), "CPU", _options(threads) | more), x)


def _options(threads: int) -> dict[str, Any]:
    """One image at a time, as fast as may be."""
    return {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}


def openvino_call(network: Any, x: Tensor) -> Callable[[], Any]:
    """A call that runs OpenVINO's compiled network on what ``x`` then holds; it returns the first output.

    Args:
        network: an ``openvino.CompiledModel`` of one input.
        x: an input; a copy in the usual memory format is read where it has another.
    """
    ov: Any = importlib.import_module("openvino")
    request = network.create_infer_request()
    given = ov.Tensor(x.contiguous().numpy(), shared_memory=True)
    request.set_input_tensor(given)
    return partial(_first_output, request, given)


def openvino_layer_times(
    file: str | Path, x: Tensor, threads: int, runs: int = 15
) -> dict[tuple[str, tuple[int, ...]], float]:
    """Milliseconds of the layers inside an OpenVINO network, by the runtime's own clock, medians over runs.

    A layer by itself reads and writes float32; inside an int8 network what it reads is int8 already and what it gives is
    rounded as it is written, so that only there is its time what the network would lose with it.

    Args:
        file: an .xml of one input. Its names are not asked: quantizing folds norms, and with them the names of layers.
        x: an input.
        threads: of the runtime.
        runs: of the network.

    Returns:
        (geometry as the table of layers' times has it, (H, W) of the output or the number of tokens) -> milliseconds with what
        the runtime fuses to it (norm, activation, a sum); of several such layers the mean.
    """
    ov: Any = importlib.import_module("openvino")
    model = ov.Core().read_model(str(file))
    network = ov.Core().compile_model(model, "CPU", _options(threads) | {"PERF_COUNT": True})
    layers = {op.get_friendly_name(): place for op in model.get_ordered_ops() if (place := _place(op)) is not None}
    operators = {}
    for operator in network.get_runtime_model().get_ops():
        info = operator.get_rt_info()
        made_of = str(info["originalLayersNames"].value).split(",") if "originalLayersNames" in info else []
        # What the runtime splits off a layer, and the layer itself then, has the layer's name with more behind it.
        for name in (part.removesuffix("/DequantizationMultiply").removesuffix("_original") for part in made_of):
            if name in layers:
                operators[operator.get_friendly_name()] = layers[name]
    request = network.create_infer_request()
    given = ov.Tensor(x.contiguous().numpy(), shared_memory=True)
    request.set_input_tensor(given)
    request.infer()
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        request.infer()
        for each in request.get_profiling_info():
            if each.node_name in operators:
                spent[each.node_name].append(1e3 * each.real_time.total_seconds())
    alike: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
    for name, values in spent.items():
        alike[operators[name]].append(statistics.median(values))
    # The clock counts whole microseconds.
    return {place: max(statistics.fmean(values), 1e-3) for place, values in alike.items()}


def _place(operator: Any) -> tuple[str, tuple[int, ...]] | None:
    """An operator's (geometry, output), or None of one that is no layer with weights."""
    kind = operator.get_type_name()
    if kind not in _LAYERS:
        return None
    weights, output = list(operator.input_value(1).get_shape()), list(operator.output(0).get_shape())
    if kind == "MatMul":
        if len(weights) != 2:
            return None
        outputs, inputs = weights if operator.get_attributes()["transpose_b"] else weights[::-1]
        return geometry_of("linear", (1,), inputs, outputs, (1,), 1), tuple(output[1:-1])
    groups = weights.pop(0) if kind.startswith("Group") else 1
    first, second, *kernel = weights
    transposed = kind.endswith("BackpropData")
    inputs, outputs = (first, second) if transposed else (second, first)
    strides = tuple(operator.get_attributes()["strides"])
    name = "conv_transpose2d" if transposed else "conv2d"
    return geometry_of(name, tuple(kernel), groups * inputs, groups * outputs, strides, groups), tuple(output[2:])


def _first_output(request: Any, given: Any) -> Any:
    """``given`` is what the request reads and does not keep alive itself."""
    return next(iter(request.infer().values()))


def open_int8(name: str, file: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    """A call that runs the network in ``file`` on what ``x`` then holds, with ``threads`` threads; it returns the first output.

    Args:
        name, file: as ``quantize_int8`` took and gave them.
        x: an input of the quantized shape; a copy in the usual memory format is read where it has another.
        threads: of the runtime.
    """
    x = x.contiguous()
    if name == "openvino int8":
        return open_openvino(file, x, threads)
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


class OneByOne(nn.Module):
    """A network that another runtime runs, as a module: images (N, C, H, W), one after the other, to its first output.

    Args:
        opened: of an image's tensor, a call that runs the network on what the tensor then holds.
        shape: of one image, (1, C, H, W).
    """

    def __init__(self, opened: Callable[[Tensor], Callable[[], Any]], shape: Sequence[int]) -> None:
        super().__init__()
        self._image = torch.zeros(tuple(shape))
        self.call = opened(self._image)

    def forward(self, x: Tensor) -> Tensor:
        """Runs the images of a batch one after the other."""
        results = []
        for image in x[:, None]:
            self._image.copy_(image)
            # The next call writes where this one's output lies.
            results.append(torch.as_tensor(self.call()).clone())
        return torch.cat(results)


def _quantize_openvino(module: nn.Module, x: Tensor, target: Path, arrays: Sequence[Any]) -> None:
    ov: Any = importlib.import_module("openvino")
    nncf: Any = importlib.import_module("nncf")
    with torch.no_grad():
        model = ov.convert_model(module, example_input=x.contiguous().clone(), input=[list(x.shape)])
    ov.save_model(nncf.quantize(model, nncf.Dataset(list(arrays)), subset_size=len(arrays)), target)


def _quantize_onnxruntime(module: nn.Module, x: Tensor, target: Path, arrays: Sequence[Any]) -> None:
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    samples = iter([{"x": value} for value in arrays])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(samples, None)

    source = target.with_name("float.onnx")
    torch.onnx.export(module, (x.contiguous(),), str(source), input_names=["x"], dynamo=True, external_data=False)
    quantization.quantize_static(str(source), str(target), Reader(), per_channel=True)
    source.unlink()
