"""OpenVINO's IR, two files: written whole, run again in a process without torch, compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bidensify._util.modes import evaluation_flags
from bidensify.deploy.export.capture import Exported, any_shapes, capture, run
from bidensify.deploy.export.checks import check_floats
from bidensify.deploy.export.several import calibration, exported, rerun, several
from bidensify.deploy.openvino import convert, program
from bidensify.deploy.runtimes.build import OPENVINO
from bidensify.deploy.runtimes.prepare import flat, prepared
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
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
            written = Path(place) / target.name
            convert.save(network, written, constants or {})
            found = rerun(OPENVINO, program.__file__, written, target.name, made, runs, rounding=int8_rest is None)
            # The .xml last: without it there is no network.
            for suffix in (".bin", ".xml"):
                os.replace(written.with_suffix(suffix), target.with_suffix(suffix))
    size = sum(target.with_suffix(suffix).stat().st_size for suffix in (".bin", ".xml"))
    return exported(target, size, "openvino", found, model)
