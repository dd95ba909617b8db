"""What tells one architecture from another: the names and shapes of its state_dict."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and shapes of the model's state_dict: two models of one architecture share it."""
    entries = sorted((name, list(value.shape)) for name, value in model.state_dict().items() if hasattr(value, "shape"))
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
