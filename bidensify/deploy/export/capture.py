"""A network's program, what it gives, and whether a file gives the same."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.errors import CheckError, PlanError
from bidensify.rewrite.record.inputs import candidate_inputs, describe_inputs

__all__ = ["Exported", "any_shapes", "argument_names", "capture", "compare", "run", "tensors"]

# A rounding difference may flip single signs, so that a few values differ a lot; a wrong graph differs everywhere.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        runtime: what ran the file again for comparison ("executorch", "onnxruntime", "torch"), or None where nothing did.
        difference: mean |file - model| over mean |model| of the output where it is largest, on the example input; None if
            nothing ran it.
        reason: why nothing ran it.
        largest: of a .pte, ``difference`` being the median over some inputs, the difference on the one where it is largest.
        note: what the file computes in another way than the network's plan says.
    """

    path: Path
    bytes: int
    runtime: str | None
    difference: float | None
    reason: str = ""
    largest: float | None = None
    note: str = ""


def run(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """(args, kwargs, output) of the first example that the network runs on.

    Raises:
        PlanError: there is none.
    """
    failures = []
    for args, kwargs in candidate_inputs(model, example_inputs):
        try:
            return args, kwargs, model(*args, **kwargs)
        except Exception as error:
            failures.append(f"{describe_inputs(args, kwargs)}: {type(error).__name__}: {str(error)[:200]}")
    raise PlanError(
        f"{type(model).__name__} runs on none of the example inputs; give your own as example_inputs. Tried:\n  "
        + "\n  ".join(failures)
    )


def _dynamic(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes = (0, 2, 3) if value.dim() == 4 else (0,) if value.dim() else ()
        return {dim: torch.export.Dim.AUTO for dim in sizes if value.shape[dim] > 1}
    if isinstance(value, (list, tuple)):
        return type(value)(_dynamic(item) for item in value)
    if isinstance(value, dict):
        return {key: _dynamic(item) for key, item in value.items()}
    return None


def any_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``torch.export`` takes as dynamic shapes, where it is to find out itself what may vary."""
    shapes = ([_dynamic(value) for value in args], {key: _dynamic(value) for key, value in kwargs.items()})
    return (
        tuple(shapes[0]) if not kwargs else shapes[1] if not args else {**argument_names(model, shapes[0]), **shapes[1]}
    )


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any
) -> torch.export.ExportedProgram:
    """The network as a program; ``given``: its dynamic shapes.

    Raises:
        PlanError: ``torch.export`` cannot capture it.
    """
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=given)
    except Exception as error:
        raise PlanError(
            f"torch.export cannot capture {type(model).__name__} on {describe_inputs(args, kwargs)}: "
            f"{type(error).__name__}: {str(error)[:500]}"
        ) from error


def argument_names(model: nn.Module, values: list[Any]) -> dict[str, Any]:
    """Values by the names of ``forward``'s first parameters."""
    return dict(zip(inspect.signature(model.forward).parameters, values))


def tensors(value: Any) -> list[Tensor]:
    """Tensors of an output, in the order of a program's."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def compare(expected: list[Tensor], outputs: list[Tensor], name: str, tolerance: float = TOLERANCE) -> float:
    """Mean |output - expected| over mean |expected|, of the output where it is largest; an infinite value differs by nothing from
    the same.

    Raises:
        CheckError: other shapes, NaN where the other has a number, or more than ``tolerance``.
    """
    shapes = [tuple(value.shape) for value in expected], [tuple(value.shape) for value in outputs]
    if shapes[0] != shapes[1]:
        raise CheckError(f"{name}: the file's outputs have shapes {shapes[1]}, the network's {shapes[0]}")
    ratios = []
    for i, (a, b) in enumerate(zip(expected, outputs)):
        a, b = a.double().cpu(), b.double()
        # Nothing but NaN agrees with a file that is wrong as well as with one that is right.
        if not torch.equal(a.isnan(), b.isnan()) or (a.numel() and a.isnan().all()):
            raise CheckError(
                f"{name}: output {i} holds {int(b.isnan().sum())} NaN of {b.numel()} values, the network's "
                f"{int(a.isnan().sum())}; nothing was written"
            )
        apart = (a != b) & ~a.isnan()
        error, size = float((a - b)[apart].abs().sum()), float(a[a.isfinite()].abs().sum())
        ratios.append(error / size if size else error)
    difference = max([0.0, *ratios])
    if not difference <= tolerance:
        raise CheckError(
            f"{name}: the file's outputs differ from the network's by {difference:.3g} of their mean size, more than "
            f"{tolerance}; nothing was written"
        )
    return difference
