"""AdamW's parameter groups, learning-rate schedules, and the moving average of weights."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.nn import binary_layers
from bidensify.recipe.sections import EmaSection, OptimizerSection, StageSection


def _decaying(model: nn.Module) -> set[int]:
    """Ids of what decays: weights of convolutions and linear maps, and any other parameter that is more than a vector.

    Biases, norms, thresholds and the parameters of activations are vectors, up to axes of size 1 as in (1, C, 1, 1).
    """
    weights = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding))
        for name, parameter in module.named_parameters(recurse=False)
        if name != "bias" and parameter.ndim > 1
    }
    return weights | {id(p) for p in model.parameters() if sum(size > 1 for size in p.shape) > 1}


def parameter_groups(model: nn.Module, optimizer: OptimizerSection, stage: StageSection) -> list[dict[str, Any]]:
    """Returns AdamW groups (key ``lr_scale`` holds each group's factor) over the trainable parameters of ``model``.

    Decaying weights, latent weights of binary layers and the rest are apart; so is every ``lr_scale``.

    Raises:
        ConfigError: a pattern of ``lr_scale`` matches no parameter.
    """
    decay = optimizer.weight_decay if stage.weight_decay is None else stage.weight_decay
    latent_decay = stage.latent_weight_decay
    if latent_decay is None:
        latent_decay = optimizer.latent_weight_decay
    if latent_decay is None:
        latent_decay = 0.0 if stage.binarize == "all" else decay
    latent = {id(p) for _, layer in binary_layers(model) for p in layer.latent_parameters()}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for pattern in optimizer.lr_scale:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            raise ConfigError(
                f"optimizer.lr_scale: the pattern {pattern!r} matches no parameter; the first names are "
                f"{[name for name, _ in named[:3]]}"
            )
    decaying = _decaying(model)
    groups: dict[tuple[float, float, str], list[Tensor]] = {}
    for name, parameter in named:
        if id(parameter) in latent:
            kind, value = "latent", latent_decay
        elif id(parameter) in decaying:
            kind, value = "decay", decay
        else:
            kind, value = "no_decay", 0.0
        scale = math.prod(s for pattern, s in optimizer.lr_scale.items() if fnmatch.fnmatchcase(name, pattern))
        groups.setdefault((value, scale, kind), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": value, "lr_scale": scale, "name": kind}
        for (value, scale, kind), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(model: nn.Module, optimizer: OptimizerSection, stage: StageSection) -> torch.optim.AdamW:
    """Returns AdamW over :func:`parameter_groups`."""
    groups = parameter_groups(model, optimizer, stage)
    # torch takes its one-pass step on a CPU only where it is asked to: 28 ms in place of 101 for U-Net ResNet-34 on one core.
    # A shared parameter (DTensor) is of another type.
    whole = all(
        type(parameter) is nn.Parameter and parameter.is_cpu for group in groups for parameter in group["params"]
    )
    return torch.optim.AdamW(groups, lr=stage.lr, betas=optimizer.betas, eps=optimizer.eps, fused=whole or None)


def lr_factor(schedule: str, step: int, total: int, warmup: float) -> float:
    """Returns the learning rate of ``step`` in 0..total-1 relative to the stage's ``lr``.

    ``warmup`` is the share of the stage in which the rate rises: for "onecycle" by a cosine from 1/25 (Smith and Topin,
    arXiv 1708.07120, with the usual division factors 25 and 1e4), for the others linearly.
    """
    rising = warmup * total
    if step < rising:
        share = (step + 1) / (rising + 1)
        return 0.04 + 0.96 * (1 - math.cos(math.pi * share)) / 2 if schedule == "onecycle" else share
    share = (step - rising) / max(total - rising, 1)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - share
    floor = 4e-6 if schedule == "onecycle" else 0.0
    return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets each group's learning rate to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class Ema:
    """Exponential moving average of a model's weights and, by option, of its buffers.

    The decay rises as (1 + n) / (10 + n) over the first updates, so that the start does not linger.
    """

    def __init__(self, model: nn.Module, section: EmaSection) -> None:
        self.section = section
        self.updates = 0
        self._live: dict[str, Tensor] = {}
        self.shadow: dict[str, Tensor] = {}
        self.reset(model)

    def reset(self, model: nn.Module) -> None:
        """Starts anew from the model's present weights."""
        self.updates = 0
        self._live = dict(model.state_dict())
        self.shadow = {key: value.detach().clone() for key, value in self._live.items()}
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        averaged = [
            key
            for key, value in self._live.items()
            if value.is_floating_point() and (key in parameters or self.section.buffers == "average")
        ]
        self._averaged = averaged
        self._copied = [key for key in self._live if key not in set(averaged)]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's weights."""
        decay = min(self.section.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        shadow, live = [self.shadow[key] for key in self._averaged], [self._live[key] for key in self._averaged]
        torch._foreach_lerp_(shadow, live, 1 - decay)
        for key in self._copied:
            self.shadow[key].copy_(self._live[key])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the average into the model for the time of the block."""
        kept = {key: value.detach().clone() for key, value in self._live.items()}
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for key, value in self._live.items():
            value.copy_(values[key])

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"updates": self.updates, "shadow": self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from :meth:`state_dict`."""
        self.updates = int(state["updates"])
        for key, value in self.shadow.items():
            value.copy_(state["shadow"][key])
