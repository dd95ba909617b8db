"""Weights from the files that people have: one loader for recipes, the command line and Python.

A file is data: safetensors, or what ``torch.save`` wrote, read with ``weights_only=True``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.wrappers import unwrap
from bidensify.errors import FormatError

__all__ = ["check_state", "load_weights", "read_state"]

# Where torch.compile, FSDP and activation checkpointing of a part of the network leave marks in the middle of names.
_MARKS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Where training programs keep the network's state within a checkpoint; the first that is there is taken.
_INSIDE = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params")


def load_weights(model: nn.Module, source: str | os.PathLike[str]) -> str:
    """Loads weights into ``model``, every tensor of it or none.

    Read are safetensors files, torch files (``.pth``, ``.pt``, ``.ckpt``; tensors and plain data only, a pickled network
    is not), with the state itself or one under ``state_dict``, ``model`` and the like, and a run's folder. What stands in
    front of every name (``module.`` of DataParallel, ``model.`` of Lightning, ``_orig_mod.`` of torch.compile) is found
    and taken off.

    Args:
        model: the network; a wrapper around it is looked through.
        source: the file, or a folder with ``model.safetensors``.

    Returns:
        What had to be understood, in words to be told; empty where names and tensors were those of the network.

    Raises:
        FormatError: there is no such file, it cannot be read, or it is of another network.
    """
    network, title = unwrap(model), f"weights {os.fspath(source)!r}"
    state, notes = read_state(source)
    state, more = _named_as(network, state, title)
    for name, own in network.state_dict().items():
        # One value is one value, with or without a dimension.
        if name in state and own.numel() == state[name].numel() == 1:
            state[name] = state[name].reshape(own.shape)
    check_state(network, state, title)
    network.load_state_dict(state)
    return "; ".join([*notes, *more])


def read_state(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Reads the state in a file, as it is named there.

    Returns:
        Tensors by name, and what had to be understood.

    Raises:
        FormatError: as for :func:`load_weights`.
    """
    file = Path(source)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise FormatError(
            f"weights {str(file)!r} do not exist; give a .safetensors, .pth or .ckpt file, or a finished run's folder"
        )
    with open(file, "rb") as opened:
        head = opened.read(9)
    # Zip archives and bare pickles are torch's; a safetensors file starts with the length of its header.
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _state_in(_read_torch(file), str(file))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file), []
    except (SafetensorError, OSError) as error:
        kind = "safetensors" if file.suffix == ".safetensors" or head[8:9] == b"{" else "a torch or safetensors file"
        raise FormatError(
            f"weights {str(file)!r} cannot be read ({error}); the file is truncated or not {kind}"
        ) from error


def _read_torch(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line]
        raise FormatError(
            f"weights {str(file)!r} hold more than tensors and plain data ({(lines or [str(error)])[0][:200]}), and reading "
            "that could run code. Where the file was made, write torch.save(model.state_dict(), FILE) instead"
        ) from error
    except Exception as error:  # torch has an error of its own for each way in which an archive can be broken
        raise FormatError(
            f"weights {str(file)!r} cannot be read ({str(error).splitlines()[0][:200]}); the file is truncated or damaged"
        ) from error


def _state_in(content: Any, file: str) -> tuple[dict[str, Tensor], list[str]]:
    notes: list[str] = []
    while isinstance(content, Mapping):
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        inside = next((key for key in _INSIDE if isinstance(content.get(key), Mapping)), None)
        if tensors and (inside is None or len(tensors) == len(content)):
            if len(tensors) < len(content):
                notes.append(f"{len(content) - len(tensors)} entries that are no tensors left out")
            return tensors, notes
        if inside is None:
            break
        notes.append(f"read from {inside!r}")
        content = content[inside]
    given = f"the keys {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else type(content).__name__
    raise FormatError(
        f"weights {file!r} hold no state_dict: {given}; it is looked for at the top and under {', '.join(_INSIDE)}"
    )


def _named_as(model: nn.Module, state: dict[str, Tensor], title: str) -> tuple[dict[str, Tensor], list[str]]:
    """Takes off what wrappers put in front of the names, and says so."""
    own, notes = model.state_dict(), []
    for mark in _MARKS:
        if any(mark in name for name in state) and not any(mark in name for name in own):
            state = {name.replace(mark, ""): value for name, value in state.items()}
            notes.append(f"{mark!r} taken out of the names")
    endings = ([name[: -len(key)] for name in state if f".{name}".endswith(f".{key}")] for key in own)
    prefixes = next((found for found in endings if found), [])
    fitting = {prefix: found for prefix in prefixes if (found := _below(own, state, prefix)).keys() >= own.keys()}
    if "" in fitting or not fitting:
        return _below(own, state, ""), notes
    if len(fitting) > 1:
        raise FormatError(
            f"{title} hold several networks of this kind, under {' and '.join(map(repr, fitting))}; write the one that is "
            "meant to a file of its own"
        )
    prefix, found = next(iter(fitting.items()))
    left = [name for name in state if not name.startswith(prefix)]
    notes.append(f"the prefix {prefix!r} taken off the names")
    if left:
        notes.append(f"{len(left)} tensors outside of it left out, {left[0]!r} among them")
    return found, notes


def _below(own: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What ``state`` has under ``prefix``; tied tensors, which safetensors writes once, get each of their names."""
    found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    places = {(own[key].data_ptr(), own[key].shape): key for key in own if key in found and own[key].data_ptr()}
    for key in own:
        if key not in found and (own[key].data_ptr(), own[key].shape) in places:
            found[key] = found[places[own[key].data_ptr(), own[key].shape]]
    return found


def check_state(model: nn.Module, state: Mapping[str, Tensor], title: str) -> None:
    """Compares names and shapes.

    Raises:
        FormatError: ``state`` is not of this model; the message names the first differences.
    """
    own = model.state_dict()
    differences = [f"{key!r} is missing" for key in own if key not in state]
    differences += [f"{key!r} is not in the model" for key in state if key not in own]
    differences += [
        f"{key!r} is {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise FormatError(
            f"{title} are of another model: {'; '.join(differences[:3])}{more}; "
            "use the model, rewrite and recipe that they were made with"
        )
