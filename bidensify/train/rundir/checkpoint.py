"""Weights and checkpoints: all that a killed run needs to go on to the same result, written whole or not at all."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify.errors import FormatError

FORMAT = 1


def save_weights(weights: Mapping[str, Tensor] | nn.Module, path: str | os.PathLike[str], single: bool = False) -> None:
    """Writes a state_dict as safetensors; keys that share memory are written out each.

    Args:
        weights: a module, or its state_dict.
        path: the file.
        single: write float64 as float32.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    plain = {key: value.detach().to("cpu").contiguous().clone() for key, value in state.items()}
    if single:
        plain = {key: value.float() if value.dtype == torch.float64 else value for key, value in plain.items()}
    with atomic_write(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of Python's, NumPy's and torch's generators, as data that ``weights_only`` loading takes."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss_next],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores a state from :func:`rng_state`."""
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint under a temporary name and renames it."""
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint; only data, never code.

    Raises:
        FormatError: the file is truncated, not a checkpoint of a run, or of another format version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise FormatError(
            f"checkpoint {str(path)!r} cannot be read: {error}; remove it to start the run anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise FormatError(f"checkpoint {str(path)!r} has format {found!r}, this version reads {FORMAT}")
    missing = [key for key in ("student", "optimizer", "ema", "rng", "state") if key not in state]
    if missing:
        raise FormatError(f"checkpoint {str(path)!r} has no {', '.join(missing)}; remove it to start the run anew")
    return state
