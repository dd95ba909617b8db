"""What the runtimes without torch read, and what they are not given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from halves import refused_half
from runtimes import RUNTIMES, needs

import bidensify as bd
from bidensify.models.unet import unet


@needs("openvino")
def test_openvino_reads_the_onnx(tmp_path: Path) -> None:
    import openvino as ov

    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    student = bd.bidensify(unet(width=8, levels=1))
    bd.calibrate(student, [torch.randn(2, 3, 64, 64)])
    packed, x = bd.pack(student.eval()), torch.randn(2, 3, 64, 64)
    done = bd.export(packed, tmp_path / "net.onnx", example_inputs=x)
    network = ov.Core().compile_model(str(done.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        want = packed(x)
    got = torch.from_numpy(network([x.numpy()])[0])
    assert float((got - want).abs().mean()) < 1e-5 * float(want.abs().mean())


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["packed so", "moved"])
def test_halves_that_a_runtime_does_not_compute_in(suffix: str, dtype: torch.dtype, how: str, tmp_path: Path) -> None:
    refused_half(suffix, dtype, how, tmp_path)
