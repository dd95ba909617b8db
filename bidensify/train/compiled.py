"""``compile: true``: the student's step through ``torch.compile``."""

from __future__ import annotations

import shutil
from typing import cast

import torch
from torch import nn

from bidensify.errors import ConfigError
from bidensify.kernels import dense
from bidensify.recipe import Recipe

__all__ = ["check_compiler", "compiled", "compiles"]


def check_compiler(recipe: Recipe) -> None:
    """Looks for what ``compile: true`` needs.

    Raises:
        ConfigError: there is no C++ compiler, or the run is sharded.
    """
    if not recipe.compile:
        return
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ConfigError(
            f"recipe {recipe.name!r} has compile: true, and torch.compile needs a C++ compiler, of which there is none on the "
            "PATH; install g++, or leave compile out"
        )
    if recipe.distributed.strategy == "fsdp":
        raise ConfigError(
            f"recipe {recipe.name!r} has compile: true with distributed.strategy: fsdp, whose layers gather their shares outside "
            "of a graph; use strategy: ddp, or leave compile out"
        )


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether a run's step is compiled: where the recipe asks, and the device has no training kernels of ours.

    On the CPU they are faster than what torch makes of the same step without them (by 1.13 on the scenes' U-Net).
    """
    return recipe.compile and (device.type != "cpu" or recipe.precision == "fp64" or not dense.available())


def compiled(model: nn.Module) -> nn.Module:
    """What calls ``model`` compiled; parameters, names, flags and hooks stay those of ``model``, which is called as ever itself.

    torch compiles at the first call, for minutes where a network is large, and again where a stage binarizes something else.
    Numbers that change as training goes on are inputs of the graph from their second value on.

    Args:
        model: a network, or DistributedDataParallel's wrapper of one.
    """
    # A graph of the stage before would be taken where its guards agree, which do not see the hooks that record features.
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model))
