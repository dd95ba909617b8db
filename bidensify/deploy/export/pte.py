"""A .pte: written whole, run again in a process without torch, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify._util.modes import evaluation_flags
from bidensify.deploy.executorch import lower, program
from bidensify.deploy.executorch.lower import Sizes
from bidensify.deploy.export.capture import Exported, argument_names, capture, run, tensors
from bidensify.deploy.export.checks import check_floats
from bidensify.deploy.export.several import calibration, judge, rounded, several, sizes_of
from bidensify.deploy.runtimes.again import run_again
from bidensify.deploy.runtimes.build import EXECUTORCH
from bidensify.deploy.runtimes.prepare import flat, in_floats, prepared
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
        expected = [tensors(made(*each, **named)) for each, named in runs]

        def own() -> list[list[Tensor]]:
            return [tensors(made(*each, **named)) for each, named in rounded(runs)]

        with atomic_write(target) as temporary:
            temporary.write_bytes(data)
            outputs = run_again(EXECUTORCH, program.__file__, temporary, [flat(*each) for each in runs])
            found = (
                None if isinstance(outputs, str) else judge(target.name, expected, outputs, None if int8_rest else own)
            )
    size = target.stat().st_size
    if isinstance(outputs, str) or found is None:
        return Exported(target, size, None, None, str(outputs), note=in_floats(model))
    note = "; ".join(each for each in (in_floats(model), found.note) if each)
    return Exported(target, size, "executorch", found.median, largest=found.largest, note=note)
