"""Methods that merge convolutions with the norms and branches beside them (timm's reparameterize_model calls them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from torch import nn

from bidensify.errors import PlanError
from bidensify.rewrite.plan.entries import LayerPlan

__all__ = ["Refusal", "fusing"]

_NAMES = ("fuse", "reparameterize", "switch_to_deploy", "convert_to_deploy")


def fusing(modules: Mapping[str, nn.Module], binary: Iterable[LayerPlan]) -> Iterator[tuple[str, str]]:
    """(path, name) of every such method of a module that holds a binary layer."""
    paths = [f".{layer.path}" for layer in binary]
    for path, module in modules.items():
        inside = f".{path}." if path else "."
        for name in _NAMES:
            if callable(getattr(type(module), name, None)) and any(each.startswith(inside) for each in paths):
                yield path, name


class Refusal:
    """Stands for a method that a rewritten network no longer has."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PlanError(
            f"{self.name} merges full-precision layers, and there are binary ones in it; call it before the rewrite"
        )
