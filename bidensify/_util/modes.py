"""What a network is while it runs: train/eval flags held still, and whether anybody listens to a part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ["evaluation_flags", "quiet"]


@contextlib.contextmanager
def evaluation_flags(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without calling ``train()`` (which a model may have overridden), flags put back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def quiet(module: nn.Module | None) -> bool:
    """Whether nobody listens to ``module``, so that what it declares may stand for a call of it."""
    return module is None or not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
