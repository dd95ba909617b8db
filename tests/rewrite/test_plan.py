"""The plan: reasons, patterns, rules, JSON."""

from __future__ import annotations

import json

import pytest
import torch
from networks import Net
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import ConfigError, PlanError
from bidensify.rewrite import Plan


def by_path(plan: Plan) -> dict[str, object]:
    return {layer.path: layer for layer in plan.layers}


def test_default_reasons() -> None:
    layers = by_path(bd.plan(Net()))
    kept = {path: layer.reason for path, layer in layers.items() if layer.action == "keep"}
    assert kept == {
        "stem.0": "first layer on the image",
        "gate.1": "on a pooled 1×1 map",
        "gate.3": "on a pooled 1×1 map",
        "head": "prediction layer",
        "unused": "never called in the recorded run",
    }


def test_macs_are_the_convolutions_own() -> None:
    model = Net()
    plan = bd.plan(model, example_inputs=torch.zeros(2, 3, 32, 48))
    counted: dict[str, int] = {}

    def count(name: str) -> object:
        def hook(module: nn.Conv2d, args: tuple[Tensor], out: Tensor) -> None:
            # A dense reference: every output value is a dot product over the receptive field.
            field = module.weight[0].numel()
            counted[name] = counted.get(name, 0) + out[0].numel() * field

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        model.eval()(torch.zeros(2, 3, 32, 48))
    assert {layer.path: layer.macs for layer in plan.layers if layer.calls} == counted


def test_transposed_convolutions_count_taps_per_input() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3, padding=1)
            self.up = nn.ConvTranspose2d(6, 4, 2, 2)
            self.norm = nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.up(self.first(x))))

    layer = by_path(bd.plan(Up(), example_inputs=torch.zeros(1, 3, 8, 8)))["up"]
    assert layer.macs == 8 * 8 * 6 * 4 * 4
    assert (layer.kind, layer.norm, layer.action) == ("conv_transpose2d", "norm", "binary")


def test_norms_and_activations_are_found() -> None:
    plan = bd.plan(Net())
    layers = by_path(plan)
    assert layers["basic.0.conv1"].norm == "basic.0.bn1"
    assert layers["basic.0.conv1"].activation
    assert layers["up1.conv"].norm is None
    assert layers["up1.conv"].activation
    assert layers["deep.0.project.0"].norm == "deep.0.project.1"
    assert {block.path for block in plan.blocks} == {
        "basic.0", "basic.1", "deep.0", "deep.1", "up1", "up2",
    }  # fmt: skip


def test_residual_rule() -> None:
    layers = by_path(bd.plan(Net()))
    # BasicBlock: the add goes, both bypasses stay. Bottleneck (narrower inside, or strided): the add stays, the last
    # convolution drops its bypass, the projection carries the shortcut.
    assert layers["basic.0.conv1"].bypass
    assert layers["basic.0.conv2"].bypass
    assert "replaces the residual add" in layers["basic.0.conv2"].reason
    for block in ("deep.0", "deep.1"):
        assert layers[f"{block}.conv1"].bypass
        assert not layers[f"{block}.conv3"].bypass
    assert layers["deep.0.project.0"].bypass


@pytest.mark.parametrize(("residual", "conv2"), [("keep", False), ("double", True)])
def test_residual_modes(residual: str, conv2: bool) -> None:
    plan = bd.plan(Net(), bd.BidensifyConfig(residual=residual))
    assert by_path(plan)["basic.0.conv2"].bypass is conv2
    assert not any("residual add" in note for block in plan.blocks for note in block.notes)


def test_rules_decide_in_order_and_count() -> None:
    config = bd.BidensifyConfig(
        rules=(
            bd.Rule("basic.0.*", "keep"),
            bd.Rule("re:basic\\..*conv1", {"act_scale": "per_channel", "bypass": False}),
            bd.Rule("class:Conv2d", "bnn", where={"kernel_size": (None, 1), "out_channels": (16, None)}),
            bd.Rule("head", "binarize"),
        )
    )
    plan = bd.plan(Net(), config)
    layers = by_path(plan)
    assert layers["basic.0.conv1"].action == layers["basic.0.conv2"].action == "keep"
    assert layers["basic.0.conv1"].reason == "rule 'basic.0.*'"
    assert (layers["basic.1.conv1"].act_scale, layers["basic.1.conv1"].bypass) == ("per_channel", False)
    assert {path for path, layer in layers.items() if layer.method == "bnn"} == {
        "deep.0.conv3", "deep.0.project.0", "deep.1.conv3",
    }  # fmt: skip
    assert layers["head"].method == "bidense"
    assert plan.rule_matches == {"basic.0.*": 2, "re:basic\\..*conv1": 2, "class:Conv2d": 3, "head": 1}


def test_a_rule_without_a_match_lists_near_names() -> None:
    with pytest.raises(ConfigError, match=r"'basic\.0\.conv3' matches no .*; did you mean .*basic\.0\.conv"):
        bd.plan(Net(), bd.BidensifyConfig(rules=(bd.Rule("basic.0.conv3"),)))


def test_a_rewrite_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(PlanError, match="would change nothing"):
        bd.plan(Net(), bd.BidensifyConfig(rules=(bd.Rule("*", "keep"),)))


def test_a_model_without_convolutions_is_an_error() -> None:
    with pytest.raises(PlanError, match="no convolution"):
        bd.plan(nn.Sequential(nn.ReLU()), example_inputs=torch.zeros(1, 3, 8, 8))


def test_unknown_method_lists_the_registered_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'bidens'; did you mean 'bidense'"):
        bd.plan(Net(), bd.BidensifyConfig(method="bidens"))


def test_a_binary_model_is_refused() -> None:
    with pytest.raises(PlanError, match="binary already"):
        bd.plan(bd.bidensify(Net()))


def test_json_round_trip_and_same_twice() -> None:
    plan = bd.plan(Net(), bd.BidensifyConfig(rules=(bd.Rule("deep.*", {"act_scale": "none"}),)))
    data = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(data).to_dict() == plan.to_dict()
    assert bd.plan(Net(), plan.config).to_dict() == plan.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version '99'"),
        ({"layers": [{"path": "x"}]}, r"not whole: layers\[0\].kind is missing"),
        ({"pth": "x"}, "unknown key pth"),
        ({"blocks": [{}]}, r"not whole: blocks\[0\].path is missing"),
    ],
)
def test_a_damaged_plan_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict({**bd.plan(Net()).to_dict(), **change})


def test_table_names_every_layer_with_its_reason() -> None:
    text = str(bd.plan(Net()))
    for word in ("basic.0.conv1", "prediction layer", "never called", "3×3 8→8", "% of MACs"):
        assert word in text


def test_functional_convolutions_are_reported() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)
            self.middle = nn.Conv2d(4, 4, 3)
            self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.last = nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.conv2d(self.middle(self.first(x)), self.kernel))

    layers = by_path(bd.plan(Functional()))
    assert layers[":conv2d"].action == "keep"
    assert "out of reach" in layers[":conv2d"].reason


@pytest.mark.parametrize("act_scale", ["per_tensor", "per_channel", "none", "spatial"])
def test_every_setting_can_be_read_back(act_scale: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    plan = bd.plan(net, bd.BidensifyConfig(method="xnor" if act_scale == "spatial" else "bidense", act_scale=act_scale))
    assert Plan.from_dict(plan.to_dict()).layers == plan.layers


def test_a_name_that_no_file_could_hold_is_refused_before_training() -> None:
    block = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"c(1)": block})
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.parts["c(1)"](x))

    with pytest.raises(PlanError, match=r"norm='parts.c\(1\).4': must be the path of a module.*: rename what it names"):
        bd.bidensify(Odd())
