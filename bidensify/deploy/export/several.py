"""Several inputs of one network, and its file run again on them without torch and held against the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.deploy.executorch.lower import AXES
from bidensify.deploy.export.capture import Exported, compare, tensors
from bidensify.deploy.runtimes.again import run_again
from bidensify.deploy.runtimes.build import Runtime
from bidensify.deploy.runtimes.prepare import flat, in_floats
from bidensify.errors import CheckError, ConfigError

__all__ = ["Judged", "calibration", "exported", "judge", "rerun", "rounded", "several", "sizes_of"]

# A runtime runs the same kernels, and its float rest rounds a little otherwise. On some inputs that turns a sign, and of an
# untrained network one sign may turn everything behind it: a wrong file differs on all of them. A large network of that kind does
# so too; how far its own outputs go when its inputs are rounded is then what the file may differ by, and half of it more. How far
# int8 is off, the user judges.
_TOLERANCE = 1e-3
_OWN = 1.5
_ROUNDING = 1e-6
_RUNS = 5


@dataclass(frozen=True)
class Judged:
    """A file's outputs against the network's, as mean |file - network| over mean |network|.

    Attributes:
        median: over the inputs.
        largest: over the inputs.
        note: what has to be said of it.
    """

    median: float
    largest: float
    note: str = ""


def several(args: Any, kwargs: Any, least: Mapping[str, int] | None = None) -> list[tuple[Any, Any]]:
    """The example, then others of its shapes, every second one with images of the sizes ``least``."""
    return [(args, kwargs), *(_like(args, kwargs, seed, (least or {}) if seed % 2 else {}) for seed in range(1, _RUNS))]


def calibration(images: Sequence[Any], args: Any, kwargs: Any, fixed: bool) -> list[Any]:
    """Images to calibrate with, those with names in the order of the program's inputs.

    They must be of the inputs: of their shapes, or where sizes vary of their channels.

    Raises:
        ConfigError: there are none, or they are not.
    """
    if not len(images):
        raise ConfigError("int8_rest needs example inputs to calibrate with, at least one; give some of your images")
    wanted = [list(x.shape) for x in flat(args, kwargs)]
    ordered = []
    for i, image in enumerate(images):
        if kwargs and isinstance(image, Mapping):
            if set(image) != set(kwargs):
                raise ConfigError(
                    f"int8_rest[{i}] names the inputs {', '.join(map(repr, image))}, and the file's are "
                    f"{', '.join(map(repr, kwargs))}: give these, as in example_inputs"
                )
            image = {name: image[name] for name in kwargs}
        ordered.append(image)
        given = [list(x.shape) for x in (flat((), image) if isinstance(image, Mapping) else flat(image, {}))]
        same = given == wanted if fixed else [(len(x), x[1:2]) for x in given] == [(len(x), x[1:2]) for x in wanted]
        if not same:
            raise ConfigError(
                f"int8_rest[{i}] has the shape {', '.join(map(str, given))}, and the file is for {', '.join(map(str, wanted))}: "
                f"give images of {'that shape' if fixed else 'as many dimensions and channels'}, or example_inputs of theirs"
            )
    return ordered


def rounded(runs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The same inputs, each value moved by up to a millionth of itself: what another order of sums makes of them."""
    generator = torch.Generator().manual_seed(0)

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        moved = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device).mul_(2).sub_(1)
        return (value.double() * (1 + _ROUNDING * moved)).to(value.dtype)

    return torch.utils._pytree.tree_map(one, list(runs))  # type: ignore[no-any-return]


def rerun(
    runtime: Runtime,
    program: str,
    path: Path,
    name: str,
    made: nn.Module,
    runs: Sequence[tuple[Any, Any]],
    *,
    rounding: bool,
) -> Judged | str:
    """Runs the file in a process without torch (``run_again``) and holds it against the network that it was made of.

    Args:
        runtime: what runs it.
        program: the Python file of that process.
        path: the file.
        name: what it will be called.
        made: the network that was captured, with the operator in it.
        runs: inputs of each run.
        rounding: whether its outputs may differ by rounding alone; False (int8): by anything.

    Returns:
        How far it is off; or why nothing ran it.

    Raises:
        CheckError: it does not run, or see ``judge``.
    """

    def of_network(inputs: Sequence[tuple[Any, Any]]) -> list[list[Tensor]]:
        return [tensors(made(*args, **kwargs)) for args, kwargs in inputs]

    outputs = run_again(runtime, program, path, name, [flat(*each) for each in runs])
    if isinstance(outputs, str):
        return outputs
    return judge(name, of_network(runs), outputs, (lambda: of_network(rounded(runs))) if rounding else None)


def exported(target: Path, size: int, runtime: str, found: Judged | str, model: nn.Module) -> Exported:
    """What is said of a file that was written, of what ``rerun`` found."""
    if isinstance(found, str):
        return Exported(target, size, None, None, found, note=in_floats(model))
    note = "; ".join(each for each in (in_floats(model), found.note) if each)
    return Exported(target, size, runtime, found.median, largest=found.largest, note=note)


def judge(
    name: str,
    expected: list[list[Tensor]],
    outputs: list[list[Tensor]],
    own: Callable[[], list[list[Tensor]]] | None,
) -> Judged:
    """Median and largest difference over all inputs.

    Args:
        name: of the file.
        expected: the network's outputs, by input.
        outputs: the file's.
        own: gives the network's outputs on ``rounded`` inputs; None: whatever the difference is, it is no fault.

    Raises:
        CheckError: other shapes or, with ``own``, a median beyond rounding.
    """
    middle, largest = _median(name, expected, outputs)
    if own is None or middle <= _TOLERANCE:
        return Judged(middle, largest)
    moved, _ = _median(name, expected, own())
    if moved > _TOLERANCE and middle <= _OWN * moved:
        return Judged(
            middle,
            largest,
            f"rounding the inputs in their sixth digit moves this network's own outputs by {moved:.2g} of their mean size: the "
            f"file's difference of {middle:.2g} is no more than that (is the network trained?)",
        )
    raise CheckError(
        f"{name}: the file's outputs differ from the network's by {middle:.3g} of their mean size in the median of "
        f"{len(expected)} inputs, more than {_TOLERANCE} and more than rounding its inputs makes of its own ({moved:.2g}); "
        "nothing was written"
    )


def _median(name: str, expected: list[list[Tensor]], outputs: list[list[Tensor]]) -> tuple[float, float]:
    found = sorted(compare(a, b, name, math.inf) for a, b in zip(expected, outputs, strict=True))
    return found[len(found) // 2], found[-1]


def sizes_of(x: Tensor, sizes: Mapping[str, int]) -> list[int]:
    """The shape of ``x``, an image's with these sizes."""
    shape = list(x.shape)
    for name, size in sizes.items() if x.dim() == 4 else ():
        shape[AXES[name]] = size
    return shape


def _like(args: Any, kwargs: Any, seed: int, sizes: Mapping[str, int]) -> tuple[Any, Any]:
    """Other inputs of the same shapes, but for ``sizes`` of images."""
    generator = torch.Generator().manual_seed(seed)

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(sizes_of(value, sizes), generator=generator).to(value)
        return noise * (value.std() if value.numel() > 1 else 1) + value.mean()

    return torch.utils._pytree.tree_map(one, (args, kwargs))  # type: ignore[no-any-return]
