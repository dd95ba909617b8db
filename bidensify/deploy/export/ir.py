"""OpenVINO's IR, two files: written whole, run again in a process without torch, compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.modes import evaluation_flags
from bidensify.deploy.export.capture import Exported, any_shapes, capture, run, tensors
from bidensify.deploy.export.checks import check_floats
from bidensify.deploy.export.several import calibration, judge, rounded, several
from bidensify.deploy.openvino import convert, program
from bidensify.deploy.runtimes.again import run_again
from bidensify.deploy.runtimes.build import OPENVINO
from bidensify.deploy.runtimes.prepare import flat, in_floats, prepared
from bidensify.errors import ConfigError

__all__ = ["export_ir"]


def export_ir(
    model: nn.Module,
    target: Path,
    example_inputs: Any,
    dynamic: bool | Mapping[str, Any] | None,
    int8_rest: Sequence[Any] | None,
    constants: Mapping[str, Sequence[float]] | None,
) -> Exported:
    """``bidensify.export`` to an IR; see there."""
    if not (dynamic is None or isinstance(dynamic, bool)):
        raise ConfigError(
            f"dynamic={dict(dynamic)!r}: bounds are ExecuTorch's (*.pte); OpenVINO takes any size with dynamic=True, and "
            "model.reshape fixes one before it compiles"
        )
    library = OPENVINO.find()
    with evaluation_flags(model), torch.no_grad():
        args, kwargs, _ = run(model, example_inputs)
        if int8_rest is not None:
            int8_rest = calibration(int8_rest, args, kwargs, fixed=not dynamic)
        inputs = flat(args, kwargs)
        check_floats(model, inputs, target.name)
        made = prepared(model, pt2e=False)
        captured = capture(made, args, kwargs, any_shapes(model, args, kwargs) if dynamic else None)
        network = convert.convert(captured, library, None if dynamic else [list(x.shape) for x in inputs])
        if int8_rest is not None:
            network = convert.with_int8_rest(network, int8_rest, library)
        runs = several(args, kwargs)
        expected = [tensors(made(*each, **named)) for each, named in runs]

        def own() -> list[list[Tensor]]:
            return [tensors(made(*each, **named)) for each, named in rounded(runs)]

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
            written = Path(place) / target.name
            convert.save(network, written, constants or {})
            outputs = run_again(OPENVINO, program.__file__, written, [flat(*each) for each in runs])
            found = (
                None if isinstance(outputs, str) else judge(target.name, expected, outputs, None if int8_rest else own)
            )
            # The .xml last: without it there is no network.
            for suffix in (".bin", ".xml"):
                os.replace(written.with_suffix(suffix), target.with_suffix(suffix))
    size = sum(target.with_suffix(suffix).stat().st_size for suffix in (".bin", ".xml"))
    if isinstance(outputs, str) or found is None:
        return Exported(target, size, None, None, str(outputs), note=in_floats(model))
    note = "; ".join(each for each in (in_floats(model), found.note) if each)
    return Exported(target, size, "openvino", found.median, largest=found.largest, note=note)
