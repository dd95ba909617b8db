"""A .pte: written whole, run again in a process without torch, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bidensify._util.files import atomic_write
from bidensify._util.modes import evaluation_flags
from bidensify.deploy.executorch import lower, program
from bidensify.deploy.executorch.lower import Sizes
from bidensify.deploy.export.capture import Exported, argument_names, capture, run
from bidensify.deploy.export.checks import check_floats
from bidensify.deploy.export.several import calibration, exported, rerun, several, sizes_of
from bidensify.deploy.runtimes.build import EXECUTORCH
from bidensify.deploy.runtimes.prepare import flat, prepared
from bidensify.errors import ConfigError

__all__ = ["export_pte"]


def export_pte(
    model: nn.Module,
    target: Path,
    example_inputs: Any,
    dynamic: bool | Sizes | None,
    int8_rest: Sequence[Any] | None,
    constants: Mapping[str, Sequence[float]] | None,
) -> Exported:
    """``bidensify.export`` to a .pte; see there."""
    if dynamic is True:
        raise ConfigError(
            "dynamic=True has no bound, and ExecuTorch plans memory for the largest image; give "
            "dynamic={'height': (128, 512, 32), 'width': (128, 512, 32)}: least, most, step"
        )
    EXECUTORCH.folder()
    with evaluation_flags(model), torch.no_grad():
        args, kwargs, _ = run(model, example_inputs)
        check_floats(model, flat(args, kwargs), target.name)
        if int8_rest is not None:
            int8_rest = calibration(int8_rest, args, kwargs, fixed=not dynamic)
        made = prepared(model)
        shapes = lower.shapes_of(dynamic or None, args, kwargs, list(argument_names(model, list(args))))
        captured = capture(made, args, kwargs, shapes)
        if int8_rest is not None:
            captured = lower.with_int8_rest(captured, int8_rest, lambda exact: capture(exact, args, kwargs, shapes))
        least = {name: bounds[0] for name, bounds in dynamic.items()} if dynamic else {}
        bounds = {f"input{i}_least": sizes_of(x, least) for i, x in enumerate(flat(args, kwargs))}
        data = lower.lower(captured, {**(constants or {}), **bounds})
        runs = several(args, kwargs, least)
        with atomic_write(target) as temporary:
            temporary.write_bytes(data)
            found = rerun(EXECUTORCH, program.__file__, temporary, target.name, made, runs, rounding=int8_rest is None)
    return exported(target, target.stat().st_size, "executorch", found, model)
