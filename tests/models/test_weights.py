"""Weights from the files that people have."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from bidensify.errors import ConfigError, FormatError
from bidensify.models import load_weights


def network(channels: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels))


def loaded(state: Any, file: Path, target: nn.Module | None = None) -> tuple[nn.Module, str]:
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    target = network() if target is None else target
    return target, load_weights(target, file)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.ckpt"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "net.model."])
def test_prefixes_of_wrappers(tmp_path: Path, prefix: str, name: str) -> None:
    source = network()
    target, note = loaded({prefix + key: value for key, value in source.state_dict().items()}, tmp_path / name)
    assert torch.equal(target[0].weight, source[0].weight)  # type: ignore[index]
    assert all(part in note for part in ("_orig_mod." if "_orig" in prefix else "", prefix.partition("_orig")[0]))
    assert bool(note) == bool(prefix)


def test_lightning(tmp_path: Path) -> None:
    source = network()
    state = {f"model.{key}": value for key, value in source.state_dict().items()}
    checkpoint = {"epoch": 3, "state_dict": {**state, "criterion.weight": torch.ones(2)}, "hyper_parameters": {"lr": 1}}
    target, note = loaded(checkpoint, tmp_path / "last.ckpt")
    assert torch.equal(target[0].weight, source[0].weight)  # type: ignore[index]
    assert "'state_dict'" in note
    assert "'model.' taken off" in note
    assert "1 tensors outside of it left out, 'criterion.weight'" in note


def test_a_compiled_part_and_a_wrapped_target(tmp_path: Path) -> None:
    source = network()
    state = {key.replace("0.", "0._orig_mod."): value for key, value in source.state_dict().items()}
    target, note = loaded({"model": state}, tmp_path / "w.pth", nn.DataParallel(network()))
    assert torch.equal(target.module[0].weight, source[0].weight)  # type: ignore[union-attr, index]
    assert "_orig_mod." in note


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    source, target = Tied(), Tied()
    save_model(source, str(tmp_path / "w.safetensors"))
    assert load_weights(target, tmp_path / "w.safetensors") == ""
    assert torch.equal(target.b.weight, source.a.weight)


def test_two_networks_in_one_file(tmp_path: Path) -> None:
    state = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in network().state_dict().items()}
    with pytest.raises(FormatError, match=r"several networks of this kind, under 'student\.' and 'teacher\.'"):
        loaded(state, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: network(5).state_dict(), r"of another model: '0\.weight' is \(5, 3, 1, 1\), the model's is \(4, 3, 1, 1\)"),
        (lambda: {k: v for k, v in network().state_dict().items() if k != "0.bias"}, r"'0\.bias' is missing"),
        (lambda: {**network().state_dict(), "2.weight": torch.ones(1)}, r"'2\.weight' is not in the model"),
        (lambda: {"epoch": 3, "best": {"score": 1.0}}, r"hold no state_dict: the keys \['best', 'epoch'\]"),
        (lambda: [1, 2], "hold no state_dict: list"),
        (lambda: network(), r"Unsupported global: GLOBAL torch\.nn\.modules\.container\.Sequential.*could run code.*state_dict"),
        (lambda: {"state_dict": network().state_dict(), "args": argparse.Namespace(a=1)}, "argparse.Namespace.*could run code"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path: Path, state: Any, message: str) -> None:
    target = network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        loaded(state(), tmp_path / "w.pth", target)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    with pytest.raises(FormatError, match=r"do not exist; give a \.safetensors, \.pth or \.ckpt file"):
        load_weights(network(), file)
    loaded(network().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(FormatError, match="cannot be read .* truncated"):
        load_weights(network(), file)
    for content in (b"", b"weights", b"\x80\x04nothing", pickle.dumps(network().state_dict())):
        file.write_bytes(content)
        with pytest.raises(FormatError, match="cannot be read|more than tensors"):
            load_weights(network(), file)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "trap").touch, ())

    torch.save({"state_dict": Trap()}, tmp_path / "w.pth")
    with pytest.raises(FormatError, match="could run code"):
        load_weights(network(), tmp_path / "w.pth")
    assert not (tmp_path / "trap").exists()


def test_a_folder_is_its_model(tmp_path: Path) -> None:
    source, target = network(), network()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_weights(target, tmp_path)
    assert torch.equal(target[0].weight, source[0].weight)
    with pytest.raises(ConfigError, match="ScriptModule.*scripted from"):
        load_weights(torch.jit.script(network()), tmp_path)
