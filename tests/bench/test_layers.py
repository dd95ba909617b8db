"""Layers timed one by one, the table that keeps them, and the plan that reads it. No time is asserted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import bidensify as bd
from bidensify._util.machine import cpu_name
from bidensify.bench.int8 import openvino_layer_times, quantize_int8
from bidensify.bench.layers import layer_times, times_table
from bidensify.cli.app import app
from bidensify.errors import FormatError, PlanError
from bidensify.models import build_model
from bidensify.rewrite.plan.times import VARIABLE, Times, geometry, read_times, write_times

X = torch.zeros(1, 3, 32, 48)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "layers.json"
    monkeypatch.setenv(VARIABLE, str(file))
    return file


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("demo:unet", width=8, levels=2).eval()


def rows(plan: bd.plan, slower: str = "") -> list[Times]:  # type: ignore[valid-type]
    found = {}
    for layer in plan.binary:  # type: ignore[attr-defined]
        ms = {"float": 1.0, "packed": 2.0 if layer.path == slower else 0.25}
        found[geometry(layer), layer.output] = Times(geometry(layer), layer.output, 1, ms, cpu_name())
    return list(found.values())


def test_each_binary_layer_is_timed_on_its_own_input(table: Path) -> None:
    network = small()
    student = bd.bidensify(network, example_inputs=X).eval()
    plan = student.bidensify_plan
    measured = layer_times(network, bd.pack(student), plan, X, seconds=0.001)
    assert [layer.path for layer, _ in measured] == [layer.path for layer in plan.binary]
    for layer, times in measured:
        assert times.geometry == geometry(layer)
        assert times.output == layer.output
        assert set(times.ms) == {"float", "packed"}
        assert times.saved == times.ms["float"] - times.ms["packed"]
    assert write_times(times for _, times in measured) == table
    found = read_times().of(plan.binary[0])
    assert found == measured[0][1]
    assert times_table(measured).row_count == len(measured)
    assert plan.table(read_times()).columns[-4].header == "ms saved"


def test_what_is_slower_as_bits_is_kept(table: Path) -> None:
    network = small()
    plan = bd.plan(network, example_inputs=X)
    slow = plan.binary[2]
    write_times(rows(plan, slow.path))
    config = bd.BidensifyConfig(keep_slower=True)
    kept = bd.plan(network, config, example_inputs=X)
    changed = [
        layer for layer in kept.layers if layer.action == "keep" and layer.path in {each.path for each in plan.binary}
    ]
    assert slow.path in [layer.path for layer in changed]
    assert all(geometry(layer) == geometry(slow) for layer in changed)
    assert "slower as bits: 2.000 ms against 1.000" in changed[0].reason
    # A rule of the user's decides first, and the stored plan needs no table.
    rule = dataclasses.replace(config, rules=(bd.Rule(slow.path, "binarize"),))
    assert slow.path in [layer.path for layer in bd.plan(network, rule, example_inputs=X).binary]
    table.unlink()
    again = type(kept).from_dict(kept.to_dict())
    assert again.layers == kept.layers
    assert bd.BidensifyConfig.from_json(config.to_json()) == config


def test_the_nearest_size_counts_and_another_machine_does_not(table: Path) -> None:
    plan = bd.plan(small(), example_inputs=X)
    layer = plan.binary[0]
    near, far = (
        Times(geometry(layer), size, 1, {"float": 1.0, "packed": 0.5}, cpu_name()) for size in ((20, 24), (400, 600))
    )
    other = dataclasses.replace(near, output=layer.output, machine="another")
    write_times([far, near, other])
    assert read_times().of(layer) == near
    assert len(json.loads(table.read_text(encoding="utf-8"))) == 3


def test_a_layer_that_was_never_measured_is_an_error(table: Path) -> None:
    with pytest.raises(PlanError, match=r"have no row in .*bidensify bench NETWORK --layers"):
        bd.plan(small(), bd.BidensifyConfig(keep_slower=True), example_inputs=X)
    table.write_text('[{"geometry": 3}]', encoding="utf-8")
    with pytest.raises(FormatError, match="is no table of layers' times"):
        read_times()


def test_the_command_line(table: Path) -> None:
    run = CliRunner().invoke(
        app, ["bench", "demo:unet", "-o", "width=8", "-o", "levels=2", "--layers", "--size", "32", "48", "--json"]
    )
    assert run.exit_code == 0, run.output
    assert {"layer", "geometry", "ms"} <= set(json.loads(run.stdout)[0])
    run = CliRunner().invoke(app, ["plan", "demo:unet", "-o", "width=8", "-o", "levels=2", "--times"])
    assert run.exit_code == 0, run.output
    assert "saved" in run.stdout


def test_int8_is_timed_inside_the_network(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    network = small()
    student = bd.bidensify(network, example_inputs=X).eval()
    plan = student.bidensify_plan
    measured = layer_times(network, bd.pack(student), plan, X, threads=(1, 2), int8=True, seconds=0.001)
    assert len(measured) == 2 * len(plan.binary)
    for layer, times in measured:
        assert set(times.ms) == {"float", "packed", "openvino int8"}, layer.path
    file = quantize_int8("openvino int8", network, X, tmp_path)
    found = openvino_layer_times(file, X, 1, runs=2)
    # Every layer of the network, the first and the last included.
    assert set(found) == {(geometry(layer), layer.output) for layer in plan.layers}


class Kinds(torch.nn.Module):
    """A grouped, a depthwise, two transposed and two linear layers, and a product that has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = torch.nn.Conv2d(8, 16, (3, 5), (2, 1), (1, 2), groups=2)
        self.depthwise = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = torch.nn.ConvTranspose2d(16, 8, 2, 2)
        self.several = torch.nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=4)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.several(self.up(self.depthwise(self.grouped(x)).relu()).relu()).flatten(2).transpose(1, 2)
        x = self.mlp(x)
        return x @ x[:, :4].transpose(1, 2)


def test_layers_of_every_kind_are_known_inside_a_quantized_network(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 12)
    found = openvino_layer_times(quantize_int8("openvino int8", Kinds().eval(), x, tmp_path), x, 1, runs=2)
    assert set(found) == {
        ("conv2d 3x5 8->16 stride 2x1 groups 2", (4, 12)), ("conv2d 3x3 16->16 stride 1x1 groups 16", (4, 12)),
        ("conv_transpose2d 2x2 16->8 stride 2x2 groups 1", (8, 24)), ("conv_transpose2d 4x4 8->8 stride 2x2 groups 4", (16, 48)),
        ("linear 1 8->24 stride 1 groups 1", (768,)), ("linear 1 24->8 stride 1 groups 1", (768,)),
    }  # fmt: skip
