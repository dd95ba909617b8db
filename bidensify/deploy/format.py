"""The packed format: ``model.safetensors`` (bits and floats) and ``bidensify.json`` (what they are).

Versions 1 and 2, which adds layers with two bit planes of activations; a file without any stays of version 1.
``bidensify.json`` is one object:

    format          "bidensify"
    format_version  1, or 2 where a layer's spec has planes = 2
    written_by      version of this package
    plan            the stored plan (replayed on the base model at load), or null
    extra           what the writer added (for example the base model's source and fingerprint)
    layers          path -> {"type", "spec", "own"}: see ``PackedSpec`` and ``PackedLayer.meta``
    aliases         tensor name -> name it shares memory with (tied weights are stored once)
    float_dtype     dtype of what is not binary, or null
    tensors         {"file", "bytes", "sha256"} of the safetensors file
    sha256          of this object without the field itself, as canonical JSON

A layer stores two tensors, ``<path>.bits`` (uint8, dense) and ``<path>.side`` (float32). Nothing is pickled or executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify._util.fingerprint import fingerprint
from bidensify._util.version import __version__
from bidensify.deploy.layers import packed_layers
from bidensify.deploy.spec import PackedSpec
from bidensify.errors import FormatError

__all__ = ["FORMAT_VERSION", "HEADER", "TENSORS", "check_fingerprint", "fingerprint", "read_packed", "write_packed"]

FORMAT_VERSION = 2
HEADER = "bidensify.json"
TENSORS = "model.safetensors"
_LARGEST_HEADER = 64 << 20
_FLOAT_DTYPES = (None, "float32", "bfloat16", "float16")
_TYPES = {"PackedConv2d": "conv", "PackedConvTranspose2d": "conv_transpose", "PackedLinear": "linear"}


def check_fingerprint(header: Mapping[str, Any], model: nn.Module, where: str = "the packed file") -> None:
    """Compares the base model with ``header["extra"]["fingerprint"]``, where there is one.

    Raises:
        FormatError: the model is of another architecture.
    """
    wanted = header.get("extra", {}).get("fingerprint")
    if wanted is not None and wanted != fingerprint(model):
        raise FormatError(
            f"{where} was made from a base model with fingerprint {str(wanted)[:12]}..., the given "
            f"{type(model).__name__} has {fingerprint(model)[:12]}... (names and shapes of its state_dict differ); "
            "build the base model with the same options"
        )


def write_packed(
    directory: str | os.PathLike[str],
    model: nn.Module,
    plan: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a packed model; each file is whole or absent, and the header comes last.

    Args:
        directory: created if need be.
        model: what ``pack`` gave.
        plan: JSON-able plan, stored with the weights.
        extra: JSON-able; "fingerprint" in it is compared at load by ``check_fingerprint``.

    Returns:
        The directory.

    Raises:
        FormatError: the model holds no packed layer, or a state that is not a tensor.
    """
    folder = Path(directory)
    layers = packed_layers(model)
    if not layers:
        raise FormatError(f"{type(model).__name__} has no packed layer; call pack(model) first")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise FormatError(f"{name}: a state of type {type(value).__name__} cannot be stored; only tensors can")
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        # Slices of one storage and channels_last weights become tensors of their own.
        stored = value.detach().cpu().contiguous()
        tensors[name] = stored.clone() if stored.untyped_storage().nbytes() != stored.nbytes else stored
    # The oldest version that says it all: a reader that knows no second plane must not take a file that has one.
    version = max(1, *(layer.spec.planes for layer in layers.values()))
    dtype = getattr(model, "_bidensify_float_dtype", None)
    with atomic_write(folder / TENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        size, digest = temporary.stat().st_size, _file_digest(temporary)
    header: dict[str, Any] = {
        "format": "bidensify",
        "format_version": version,
        "written_by": __version__,
        "plan": None if plan is None else dict(plan),
        "extra": dict(extra or {}),
        "layers": {path: layer.meta() for path, layer in layers.items()},
        "aliases": aliases,
        "float_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "tensors": {"file": TENSORS, "bytes": size, "sha256": digest},
    }
    header["sha256"] = hashlib.sha256(_canonical(header)).hexdigest()
    with atomic_write(folder / HEADER) as temporary:
        temporary.write_bytes(_canonical(header))
    return folder


def read_packed(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads and checks a packed model's files.

    Returns:
        (header, tensors): the object described above and name -> tensor (aliases included), memory-mapped.

    Raises:
        FormatError: a file is missing, truncated, edited, of an unknown version, or does not fit its own description.
    """
    folder = Path(directory)
    header = _read_header(folder / HEADER)
    version = header.get("format_version")
    reader = _READERS.get(version) if isinstance(version, int) and not isinstance(version, bool) else None
    if reader is None:
        raise FormatError(
            f"{folder / HEADER}: format_version={str(version)[:40]!r}; this bidensify ({__version__}) reads "
            f"{sorted(_READERS)}. Install a newer bidensify to read it"
        )
    return reader(folder, header)


def _read_header(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= _LARGEST_HEADER else b""
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read ({error.strerror}); give a folder that save_pretrained wrote"
        ) from error
    if not raw:
        raise FormatError(f"{path}: {size} bytes, must be within 1..{_LARGEST_HEADER}; the file is damaged")
    try:
        header = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON ({str(error)[:120]}); the file is truncated or damaged") from error
    if not isinstance(header, dict) or header.get("format") != "bidensify":
        raise FormatError(f"{path}: is not a bidensify header ('format' must be 'bidensify')")
    return header


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the constant {name} is not allowed")


def _read_file(folder: Path, header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    where = str(folder / HEADER)
    body = {key: value for key, value in header.items() if key != "sha256"}
    try:
        digest = hashlib.sha256(_canonical(body)).hexdigest()
    except (ValueError, RecursionError, UnicodeEncodeError) as error:
        raise FormatError(f"{where}: cannot be hashed ({str(error)[:120]}); the file is damaged") from error
    if digest != header.get("sha256"):
        raise FormatError(f"{where}: its content does not match its own hash; the file was edited or damaged")
    _check_header(header, where)
    tensors = _read_tensors(folder, header["tensors"])
    for name, source in header["aliases"].items():
        if source not in tensors or name in tensors:
            raise FormatError(f"{where}: the alias {name!r} of {source!r} fits no tensor; the file is damaged")
        tensors[name] = tensors[source]
    for path, meta in header["layers"].items():
        _check_layer(path, meta, tensors, header["format_version"])
    return header, tensors


_READERS: dict[int, Callable[[Path, dict[str, Any]], tuple[dict[str, Any], dict[str, Tensor]]]] = dict.fromkeys(
    range(1, FORMAT_VERSION + 1), _read_file
)


def _check_header(header: dict[str, Any], where: str) -> None:
    for key, kind in (("layers", dict), ("aliases", dict), ("extra", dict), ("tensors", dict)):
        if not isinstance(header.get(key), kind):
            raise FormatError(f"{where}: {key!r} must be an object; the file is damaged")
    if not (header.get("plan") is None or isinstance(header["plan"], dict)):
        raise FormatError(f"{where}: 'plan' must be an object or null; the file is damaged")
    if header.get("float_dtype") not in _FLOAT_DTYPES:
        raise FormatError(
            f"{where}: float_dtype={str(header['float_dtype'])[:40]!r} must be one of {list(_FLOAT_DTYPES)}"
        )
    if not header["layers"]:
        raise FormatError(f"{where}: 'layers' is empty; the file is damaged")
    if not all(isinstance(value, str) for value in header["aliases"].values()):
        raise FormatError(f"{where}: 'aliases' must map names to names; the file is damaged")


def _check_layer(path: str, meta: Any, tensors: dict[str, Tensor], version: int) -> None:
    kind = meta.get("type") if isinstance(meta, dict) else None
    if not isinstance(kind, str) or kind not in _TYPES:
        raise FormatError(f"{path}: a layer's 'type' must be one of {list(_TYPES)}; the file is damaged")
    spec = PackedSpec.from_dict(meta.get("spec", {}), path)
    if spec.planes > version:
        raise FormatError(f"{path}: planes={spec.planes} in a file of version {version}; the file is damaged")
    if spec.kind != _TYPES[kind]:
        raise FormatError(f"{path}: type {kind!r} with kind={spec.kind!r}; the file is damaged")
    prefix = f"{path}." if path else ""
    for name, shape, dtype in (
        ("bits", (-(-spec.bits // 8),), torch.uint8),
        ("side", (spec.side_length,), torch.float32),
    ):
        tensor = tensors.get(prefix + name)
        if tensor is None:
            raise FormatError(f"{path}: the tensor {prefix + name!r} is missing; the file is damaged")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise FormatError(
                f"{path}: {prefix + name!r} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, the layer needs "
                f"{shape} and {dtype}; the file is damaged"
            )


def _read_tensors(folder: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / TENSORS
    if record.get("file") != TENSORS:
        raise FormatError(f"{folder / HEADER}: tensors file {str(record.get('file'))[:80]!r} must be {TENSORS!r}")
    try:
        size = path.stat().st_size
        if size != record.get("bytes"):
            raise FormatError(
                f"{path}: {size} bytes, the header says {str(record.get('bytes'))[:40]}; truncated or replaced"
            )
        if _file_digest(path) != record.get("sha256"):
            raise FormatError(f"{path}: its content does not match the header's hash; the file was edited or damaged")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read ({error.strerror}); give a folder that save_pretrained wrote"
        ) from error
    except SafetensorError as error:
        raise FormatError(f"{path}: is not a safetensors file ({str(error)[:120]})") from error


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise FormatError(f"the header must be plain JSON: {error}") from error
    return text.encode("utf-8")
