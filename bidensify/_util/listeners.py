"""Who wants to know that a network was rewritten, rebuilt or packed (an integration that stores it with the network)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["announce", "listen"]

_listeners: list[Callable[[nn.Module], None]] = []


def listen(function: Callable[[nn.Module], None]) -> None:
    """From now on ``function`` is called with every network that is rewritten, rebuilt from a plan or packed."""
    if function not in _listeners:
        _listeners.append(function)


def announce(model: nn.Module) -> None:
    """Tells the listeners that ``model`` is in its new state."""
    for function in _listeners:
        function(model)
