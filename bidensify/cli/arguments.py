"""Turns what was typed into objects: values, models, configurations, weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidensify._util.yamltext import parse_yaml
from bidensify.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bidensify.config import BidensifyConfig


def parse_assignments(texts: Sequence[str], option: str) -> dict[str, Any]:
    """Reads ``["a=1", "b.c=[2, 3]"]`` as ``{"a": 1, "b.c": [2, 3]}``; values are YAML, so ``null`` is None.

    Raises:
        ConfigError: a text without ``=``, an empty name, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{option} {text!r} is not NAME=VALUE; write for example {option} width=16")
        try:
            values[name.strip()], _ = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"{option} {text!r}: {value!r} is not a YAML value ({error}); quote texts") from None
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML (or JSON) file whose top level is a mapping.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    try:
        content, twice = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from None
    if twice:
        raise ConfigError(f"{str(path)!r}: {'; '.join(twice)}")
    if not isinstance(content, dict):
        given = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ConfigError(f"{str(path)!r} {given}; write names and values, for example method: bidense")
    return content


def make_config(
    config: Path | None, method: str | None, keep: Sequence[str], act_bits: int | None = None
) -> BidensifyConfig:
    """Builds the configuration from a file, a method name, globs of layers to keep and bits, later ones adding to earlier."""
    from bidensify.config import BidensifyConfig

    fields = read_yaml(config) if config is not None else {}
    if method is not None:
        fields["method"] = method
    if act_bits is not None:
        fields["act_bits"] = act_bits
    if keep:
        fields["rules"] = [*(fields.get("rules") or []), *({"match": glob, "action": "keep"} for glob in keep)]
    return BidensifyConfig.from_dict(fields)


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Reads ``"1x3x128x160"`` (also ``"3x128x160"`` and ``"128x160"``) as an image shape (N, C, H, W).

    Raises:
        ConfigError: another form, or a size below 1.
    """
    try:
        sizes = [int(part) for part in text.lower().replace(",", "x").split("x")]
    except ValueError:
        sizes = []
    defaults = (1, 3)
    if not 2 <= len(sizes) <= 4 or min(sizes) < 1:
        raise ConfigError(f"--input {text!r} is no shape; write [[N]xC]xHxW, for example 3x128x160")
    shape = [*defaults[: 4 - len(sizes)], *sizes]
    return shape[0], shape[1], shape[2], shape[3]


def example_of(text: str | None) -> Tensor | None:
    """Returns zeros of the shape that ``--input`` gives, or None where it was left out."""
    import torch

    return None if text is None else torch.zeros(parse_shape(text))


def sizes_of(text: str) -> dict[str, tuple[int, int, int]]:
    """Reads ``"128:512:32"``, the least and largest height and width and their step.

    Raises:
        ConfigError: another form.
    """
    try:
        least, most, step = (int(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"--sizes {text!r} is no range; write LEAST:MOST:STEP, for example 128:512:32") from None
    return {"height": (least, most, step), "width": (least, most, step)}


def parse_device(text: str) -> torch.device:
    """Reads ``--device``: a device that is here.

    Raises:
        ConfigError: no device's name, or a device that this machine or this build of PyTorch does not have.
    """
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigError(f"--device {text!r} is no device; write cpu, cuda or cuda:1") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {text!r} cannot be used here ({str(error).splitlines()[0]}); use cpu") from None
    return device


def make_model(spec: str, options: Sequence[str], weights: Path | None) -> nn.Module:
    """Builds ``spec`` and loads full-precision ``weights`` into it, if given."""
    from bidensify.models import build_model, load_weights

    model = build_model(spec, **parse_assignments(options, "--option"))
    if weights is not None:
        note = load_weights(model, weights)
        if note:
            print(f"{weights}: {note}", file=sys.stderr)
    return model


def to_json(value: Any) -> str:
    """Returns ``value`` as JSON text for standard output; what is no number there (NaN) is null."""
    from bidensify.train.rundir.logs import plain

    return json.dumps(plain(value), indent=2, ensure_ascii=False, default=str)


def refuse_existing(out: Path) -> None:
    """Raises :class:`ConfigError` when ``out`` exists and holds anything: nothing of the user's is overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} exists and is not empty; give a new folder, or remove that one first")
