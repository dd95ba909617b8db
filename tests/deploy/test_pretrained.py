"""save_pretrained / from_pretrained: the same outputs, and an error for every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bidensify as bd
from bidensify.errors import FormatError, PlanError
from bidensify.models import build_model
from bidensify.nn import binary_layers


def own_network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 2, 1),
    )


@pytest.fixture
def student() -> nn.Module:
    model = bd.bidensify(own_network())
    bd.calibrate(model, [torch.randn(4, 3, 16, 16)])
    return model.eval()


@pytest.mark.parametrize("packed", [False, True])
def test_round_trip_with_a_base_model(student: nn.Module, packed: bool, tmp_path: Path) -> None:
    model = bd.pack(student) if packed else student
    bd.save_pretrained(model, tmp_path)
    base = own_network()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    again = bd.from_pretrained(tmp_path, base)
    x = torch.randn(2, 3, 20, 12)
    assert torch.equal(again(x), model(x))
    assert not again.training
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize("packed", [False, True])
def test_round_trip_by_name(packed: bool, tmp_path: Path) -> None:
    model = bd.bidensify(build_model("demo:unet")).eval()
    if packed:
        model = bd.pack(model)
    bd.save_pretrained(model, tmp_path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(bd.from_pretrained(tmp_path)(x), model(x))


def test_packed_file_is_small(tmp_path: Path) -> None:
    model = bd.bidensify(build_model("demo:unet"))
    binary = sum(layer.latent_weight.numel() for _, layer in bd.nn.binary_layers(model))
    bd.save_pretrained(bd.pack(model), tmp_path)
    summary = bd.summary(model, (3, 32, 32))
    assert summary.total("binary_params") == binary
    bound = binary / 8 + 4 * summary.total("float_params")
    assert (tmp_path / "model.safetensors").stat().st_size <= 1.05 * bound + 16384


@pytest.mark.parametrize("packed", [False, True])
class TestDamage:
    def save(self, student: nn.Module, packed: bool, folder: Path) -> Path:
        return bd.save_pretrained(bd.pack(student) if packed else student, folder)

    def test_another_base_model(self, student: nn.Module, packed: bool, tmp_path: Path) -> None:
        self.save(student, packed, tmp_path)
        with pytest.raises(FormatError, match="another base model"):
            bd.from_pretrained(tmp_path, own_network(width=9))

    def test_no_base_model(self, student: nn.Module, packed: bool, tmp_path: Path) -> None:
        self.save(student, packed, tmp_path)
        with pytest.raises(FormatError, match=r"pass the full-precision network: from_pretrained\(directory, model\)"):
            bd.from_pretrained(tmp_path)

    def test_truncated_and_empty_files(self, student: nn.Module, packed: bool, tmp_path: Path) -> None:
        for name in ("model.safetensors", "bidensify.json"):
            for keep in (0.0, 0.5, 0.99):
                folder = tmp_path / f"{name}-{keep}"
                self.save(student, packed, folder)
                data = (folder / name).read_bytes()
                (folder / name).write_bytes(data[: int(len(data) * keep)])
                with pytest.raises(FormatError):
                    bd.from_pretrained(folder, own_network())

    def test_missing_files(self, student: nn.Module, packed: bool, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="no bidensify.json"):
            bd.from_pretrained(tmp_path, own_network())
        self.save(student, packed, tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(FormatError):
            bd.from_pretrained(tmp_path, own_network())

    def test_unknown_version(self, student: nn.Module, packed: bool, tmp_path: Path) -> None:
        self.save(student, packed, tmp_path)
        header = json.loads((tmp_path / "bidensify.json").read_text())
        header["format_version"] = 99
        (tmp_path / "bidensify.json").write_text(json.dumps(header))
        with pytest.raises(FormatError, match="99"):
            bd.from_pretrained(tmp_path, own_network())


def test_a_file_cannot_name_code_to_import(student: nn.Module, tmp_path: Path) -> None:
    student.bidensify_source = {"spec": "os:system", "options": {}}
    bd.save_pretrained(student, tmp_path)
    with pytest.raises(FormatError, match="somebody's own code"):
        bd.from_pretrained(tmp_path)


def test_what_cannot_be_saved(student: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="carries no plan"):
        bd.save_pretrained(own_network(), tmp_path)
    with pytest.raises(PlanError, match="carries no plan"):
        bd.save_pretrained(student[2], tmp_path)


def test_a_binary_base_is_refused(student: nn.Module, tmp_path: Path) -> None:
    bd.save_pretrained(student, tmp_path)
    with pytest.raises(FormatError, match="binary already"):
        bd.from_pretrained(tmp_path, student)


@pytest.mark.parametrize("packed", [False, True])
def test_a_base_on_the_meta_device_is_enough(packed: bool, tmp_path: Path) -> None:
    model = bd.bidensify(build_model("demo:unet", width=8))
    bd.calibrate(model, [torch.randn(2, 3, 32, 32)])
    model.eval()
    saved = bd.pack(model) if packed else model
    bd.save_pretrained(saved, tmp_path)
    with torch.device("meta"):
        base = build_model("demo:unet", width=8)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(bd.from_pretrained(tmp_path, base)(x), saved(x))
    assert all(parameter.is_meta for parameter in base.parameters())


def test_a_buffer_that_no_file_holds_is_not_made_up(student: nn.Module, tmp_path: Path) -> None:
    bd.save_pretrained(student, tmp_path)
    base = own_network().to("meta")
    base[0].register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
    with pytest.raises(FormatError, match=r"its buffer '0\.table' is in no file; build it on the CPU"):
        bd.from_pretrained(tmp_path, base)


def test_bases_that_are_none(student: nn.Module, tmp_path: Path) -> None:
    bd.save_pretrained(student, tmp_path)
    with pytest.raises(FormatError, match="is a str, no nn.Module"):
        bd.from_pretrained(tmp_path, "demo:unet")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="2: the given base model is packed already"):
        bd.from_pretrained(tmp_path, bd.pack(student))


class Pair(NamedTuple):
    """A layer with a number."""

    layer: nn.Module
    factor: float


class Keeping(nn.Module):
    """Layers that are called through what the module keeps beside its children."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 2, 1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.how, pair = how, (self.a, self.b)
        self.kept: Any = {
            "list": [*pair],
            "tuple": pair,
            "dict": {"a": pair[0], "b": pair[1]},
            "pairs": [(layer, 1.0) for layer in pair],
            "named": {"all": [Pair(layer, 1.0) for layer in pair]},
            "itself": [*pair],
        }[how]
        if how == "itself":
            self.kept.append(self.kept)

    def layers(self) -> list[nn.Module]:
        how, kept = self.how, self.kept
        if how in ("pairs", "named"):
            return [pair[0] for pair in (kept if how == "pairs" else kept["all"])]
        return list(kept.values() if how == "dict" else kept)[:2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers():
            x = torch.sigmoid(layer(x))
        return self.head(x)


@pytest.mark.parametrize("how", ["list", "tuple", "dict", "pairs", "named", "itself"])
def test_layers_that_a_module_keeps_beside_its_children_are_packed_too(how: str, tmp_path: Path) -> None:
    config = bd.BidensifyConfig(rules=[bd.Rule("a", "bidense"), bd.Rule("b", "bidense")])
    x = torch.randn(2, 3, 16, 16)
    packed = bd.pack(bd.bidensify(Keeping(how), config, example_inputs=x).eval())
    bd.save_pretrained(packed, tmp_path)
    again = bd.from_pretrained(tmp_path, Keeping(how))
    assert [id(layer) for layer in again.layers()] == [id(again.a), id(again.b)]
    assert torch.equal(again(x), packed(x))


def test_a_network_of_version_1_of_its_configuration_gives_its_stored_output() -> None:
    """Written once, by a release whose layers joined their bypasses before the activation."""
    folder = Path(__file__).parent / "data" / "latent_of_config_1"
    model = bd.from_pretrained(folder).eval()
    layers = [layer for _, layer in binary_layers(model)]
    assert {layer.method for layer in layers} == {"bidense-in-paper", "bidense-cfb-in-paper"}
    assert not any(layer.activation_first for layer in layers)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        close = torch.isclose(model(expected["input"]), expected["output"], rtol=1e-4, atol=1e-5)
    # Another processor's stem may round one value to the other side of a threshold.
    assert close.float().mean() > 0.98
