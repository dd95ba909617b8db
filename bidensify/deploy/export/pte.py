"""A .pte: written whole, run again in a process without torch, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify._util.modes import evaluation_flags
from bidensify.deploy.executorch import lower
from bidensify.deploy.executorch.build import executorch_folder
from bidensify.deploy.executorch.lower import Sizes
from bidensify.deploy.export.capture import Exported, argument_names, capture, compare, run, tensors
from bidensify.errors import CheckError, ConfigError

__all__ = ["export_pte"]

# It runs the same kernels, and its float rest rounds a little otherwise. On some inputs that turns a sign, and of an untrained
# network one sign may turn everything behind it: a wrong file differs on all of them. How far int8 is off, the user judges.
_TOLERANCE = 1e-3
_RUNS = 5


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
    executorch_folder()
    with evaluation_flags(model), torch.no_grad():
        args, kwargs, _ = run(model, example_inputs)
        made = lower.prepared(model)
        shapes = lower.shapes_of(dynamic or None, args, kwargs, list(argument_names(model, list(args))))
        program = capture(made, args, kwargs, shapes)
        if int8_rest is not None:
            program = lower.with_int8_rest(program, int8_rest, lambda exact: capture(exact, args, kwargs, shapes))
        least = {name: bounds[0] for name, bounds in dynamic.items()} if dynamic else {}
        bounds = {f"input{i}_least": _sizes(x, least) for i, x in enumerate(lower.flat(args, kwargs))}
        data = lower.lower(program, {**(constants or {}), **bounds})
        runs = [(args, kwargs), *(_like(args, kwargs, seed, least if seed % 2 else {}) for seed in range(1, _RUNS))]
        expected = [tensors(made(*each, **named)) for each, named in runs]
        with atomic_write(target) as temporary:
            temporary.write_bytes(data)
            outputs = lower.run_again(temporary, [lower.flat(*each) for each in runs])
            found = []
            if not isinstance(outputs, str):
                found = sorted(compare(a, b, target.name, math.inf) for a, b in zip(expected, outputs, strict=True))
                if int8_rest is None and found[_RUNS // 2] > _TOLERANCE:
                    raise CheckError(
                        f"{target.name}: the file's outputs differ from the network's by {found[_RUNS // 2]:.3g} of their mean "
                        f"size in the median of {_RUNS} inputs, more than {_TOLERANCE}; nothing was written"
                    )
    size = target.stat().st_size
    if isinstance(outputs, str):
        return Exported(target, size, None, None, outputs)
    return Exported(target, size, "executorch", found[_RUNS // 2], largest=found[-1])


def _sizes(x: Tensor, sizes: Mapping[str, int]) -> list[int]:
    """The shape of ``x``, an image's with these sizes."""
    shape = list(x.shape)
    for name, size in sizes.items() if x.dim() == 4 else ():
        shape[lower.AXES[name]] = size
    return shape


def _like(args: Any, kwargs: Any, seed: int, sizes: Mapping[str, int]) -> tuple[Any, Any]:
    """Other inputs of the same shapes, but for ``sizes`` of images."""
    generator = torch.Generator().manual_seed(seed)

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(_sizes(value, sizes), generator=generator).to(value)
        return noise * (value.std() if value.numel() > 1 else 1) + value.mean()

    return torch.utils._pytree.tree_map(one, (args, kwargs))  # type: ignore[no-any-return]
