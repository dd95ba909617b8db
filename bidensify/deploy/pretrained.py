"""Save a rewritten network, latent or packed, and rebuild it from its base model: no data, no forward pass."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify._util.fingerprint import fingerprint
from bidensify._util.listeners import announce
from bidensify._util.wrappers import unwrap
from bidensify.errors import FormatError, PlanError
from bidensify.nn import BinaryLayer, FrozenLayer
from bidensify.nn.used_weight import copy_model
from bidensify.rewrite.apply.model import apply_plan
from bidensify.rewrite.plan.schema import Plan

__all__ = ["empty_packed", "from_pretrained", "save_pretrained"]

LATENT_VERSION = 1
_HEADER = "bidensify.json"
_TENSORS = "model.safetensors"


def _plan_of(model: nn.Module) -> Plan:
    # A copy of an fx.GraphModule has what is in its ``meta``, not its attributes.
    plan = getattr(model, "bidensify_plan", None) or getattr(model, "meta", {}).get("bidensify_plan")
    if not isinstance(plan, Plan):
        raise PlanError(
            f"{type(model).__name__} carries no plan (.bidensify_plan), so it could not be rebuilt from its base model; "
            "save the network that bidensify() or pack() returned, not a part of it"
        )
    return plan


def _jsonable(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None
) -> Path:
    """Writes a rewritten network: ``model.safetensors`` and ``bidensify.json`` (plan, configuration, base's fingerprint).

    A packed network is written as bits; a latent one with its float weights.

    Args:
        model: what ``bidensify`` or ``pack`` returned.
        directory: created if need be; files in it are replaced whole.
        extra: JSON-able, kept in the header's ``extra`` beside the base's fingerprint and name (for example "recipe": what
            the network is for).

    Returns:
        The directory.

    Raises:
        PlanError: the model carries no plan.
    """
    from bidensify.deploy.format import write_packed
    from bidensify.deploy.layers import packed_layers

    model = unwrap(model)
    plan = _plan_of(model)
    source = _jsonable(getattr(model, "bidensify_source", None))
    extra = {**(extra or {}), "fingerprint": plan.fingerprint, "source": source}
    if packed_layers(model):
        return write_packed(directory, model, plan.to_dict(), extra)
    if not any(isinstance(module, BinaryLayer) for module in model.modules()):
        raise PlanError(
            f"{type(model).__name__} has no binary layer; save a network that bidensify() or pack() returned"
        )
    from safetensors.torch import save_model

    folder = Path(directory)
    with atomic_write(folder / _TENSORS) as temporary:
        save_model(model, str(temporary))
    header = {
        "format": "bidensify-latent",
        "format_version": LATENT_VERSION,
        "plan": plan.to_dict(),
        "extra": extra,
    }
    with atomic_write(folder / _HEADER) as temporary:
        temporary.write_text(json.dumps(header, indent=1), encoding="utf-8")
    return folder


def _peek(folder: Path) -> Mapping[str, Any]:
    path = folder / _HEADER
    if not path.is_file():
        raise FormatError(f"{folder}: there is no {_HEADER} in it; give a folder that save_pretrained wrote")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not whole JSON ({error}); save the model again") from error
    if not isinstance(header, dict):
        raise FormatError(f"{path} holds a {type(header).__name__}, not an object; save the model again")
    return header


def _base(header: Mapping[str, Any], model: nn.Module | None, where: Path) -> nn.Module:
    extra = header.get("extra")
    extra = extra if isinstance(extra, dict) else {}
    if model is None:
        from bidensify.models import model_sources, rebuild_model

        source = extra.get("source")
        if not isinstance(source, dict) or not isinstance(source.get("spec"), str):
            raise FormatError(
                f"{where}: it does not say how to build its base model (the network was not made by name); pass the "
                "full-precision network: from_pretrained(directory, model)"
            )
        if ":" not in source["spec"] or source["spec"].partition(":")[0] not in model_sources():
            raise FormatError(
                f"{where}: its base model {source['spec']!r} is somebody's own code, which a file must not name; build "
                "it yourself: from_pretrained(directory, model)"
            )
        options = source.get("options")
        model = rebuild_model(source["spec"], options if isinstance(options, dict) else {}, str(where))
    else:
        if not isinstance(model, nn.Module):
            raise FormatError(
                f"{where}: the given base model is a {type(model).__name__}, no nn.Module; give the network"
            )
        model = unwrap(model)
        for path, module in model.named_modules():
            if isinstance(module, BinaryLayer | FrozenLayer):
                state = "packed" if isinstance(module, FrozenLayer) else "binary"
                raise FormatError(f"{path}: the given base model is {state} already; give the full-precision one")
        model = copy_model(model)
    wanted = extra.get("fingerprint")
    if wanted and wanted != fingerprint(model):
        raise FormatError(
            f"{where} was made from another base model: fingerprint {str(wanted)[:12]}..., the given "
            f"{type(model).__name__} has {fingerprint(model)[:12]}... (names and shapes of its state_dict differ); build "
            "the base model with the same options"
        )
    return model


def _load_state(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:400]
        raise FormatError(f"{where}: its tensors do not fit the rewritten network: {text}") from error


def from_pretrained(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Rebuilds a network that ``save_pretrained`` wrote, latent or packed.

    Args:
        directory: the folder.
        model: the full-precision base network (left as it is); by default built by the name that the file holds.

    Returns:
        The network in evaluation mode, where ``model`` is (on the CPU for one on the meta device).

    Raises:
        FormatError: a file is missing, truncated, edited, of an unknown version, or of another base model.
    """
    folder = Path(directory)
    header = _peek(folder)
    if header.get("format") == "bidensify-latent":
        return _load_latent(folder, header, model)
    return _load_packed(folder, model)


def _stored_plan(header: Mapping[str, Any], folder: Path) -> Plan:
    stored = header.get("plan")
    if not isinstance(stored, dict):
        raise FormatError(f"{folder / _HEADER}: there is no plan in it; save the model again")
    try:
        return Plan.from_dict(stored)
    except ValueError as error:
        raise FormatError(f"{folder / _HEADER}: {error}") from error


def _rewritten(header: Mapping[str, Any], folder: Path, model: nn.Module | None) -> nn.Module:
    plan = _stored_plan(header, folder)
    base = _base(header, model, folder)
    try:
        return apply_plan(base, plan)
    except PlanError as error:
        raise FormatError(f"{folder}: {error}") from error


def _off_meta(model: nn.Module, where: Path) -> nn.Module:
    """Gives what is on the meta device memory on the CPU, for the file's tensors; ties stay."""
    state = set(model.state_dict())
    memo: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None or not tensor.is_meta:
                    continue
                full = f"{path}.{name}" if path else name
                if full not in state:
                    raise FormatError(
                        f"{where}: the given base model is on the meta device, and its buffer {full!r} is in no file; build "
                        "it on the CPU"
                    )
                if id(tensor) not in memo:
                    empty = torch.empty_like(tensor, device="cpu")
                    memo[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    )
                own[name] = memo[id(tensor)]
    return model


def _load_latent(folder: Path, header: Mapping[str, Any], model: nn.Module | None) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if header.get("format_version") != LATENT_VERSION:
        raise FormatError(
            f"{folder / _HEADER}: format_version={header.get('format_version')!r}; this release reads {LATENT_VERSION}: "
            "update bidensify"
        )
    result = _off_meta(_rewritten(header, folder, model), folder)
    path = folder / _TENSORS
    if not path.is_file():
        raise FormatError(f"{folder}: there is no {_TENSORS} in it; save the model again")
    try:
        load_model(result, str(path))
    except (SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())[:400]
        raise FormatError(f"{path} is damaged or of another model: {text}") from error
    return result.eval()


def empty_packed(model: nn.Module, layers: Mapping[str, Any], where: str) -> nn.Module:
    """Puts empty packed layers in place of a rewritten network's binary ones, in place.

    Args:
        model: the network as its plan makes it.
        layers: path -> ``PackedLayer.meta()``.
        where: what errors call the source.

    Returns:
        ``model`` (or the packed layer itself where the network is a single layer).

    Raises:
        FormatError: the layers are not those of the network, or a description is damaged.
    """
    from bidensify.deploy.freeze import empty_from_meta
    from bidensify.deploy.pack import replace_layers

    latent = {path: module for path, module in model.named_modules() if isinstance(module, BinaryLayer)}
    if set(layers) != set(latent):
        odd = sorted(set(layers) ^ set(latent))
        raise FormatError(f"{where}: its packed layers and its plan differ at {odd[0]!r}; save the model again")
    packed = {path: empty_from_meta(meta, latent[path], name=path) for path, meta in layers.items()}
    return replace_layers(model, packed)


def _load_packed(folder: Path, model: nn.Module | None) -> nn.Module:
    from bidensify.deploy.format import read_packed
    from bidensify.deploy.pack import set_float_dtype, settle

    header, tensors = read_packed(folder)
    result = _off_meta(empty_packed(_rewritten(header, folder, model), header["layers"], str(folder)), folder)
    _load_state(result, tensors, folder)
    result.eval()
    settle(result)
    dtype = header.get("float_dtype")
    if isinstance(dtype, str):
        return set_float_dtype(result, getattr(torch, dtype))
    announce(result)
    return result
