"""What tells one network from another: the names and shapes of its state_dict, and what its tensors hold."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

__all__ = ["fingerprint", "weights_fingerprint"]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and shapes of the model's state_dict: two models of one architecture share it."""
    entries = sorted((name, list(value.shape)) for name, value in model.state_dict().items() if hasattr(value, "shape"))
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, types and values of the model's state_dict."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if hasattr(value, "shape"):
            digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
            # Bytes of any type, bfloat16 among them, which NumPy does not have.
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
