"""A network's train/eval flags, held still while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ["evaluation_flags"]


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
