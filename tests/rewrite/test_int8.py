"""int8 as an action of a rule: in the plan, the network, its files, its summary and what is made of it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import bidensify as bd
from bidensify.errors import PlanError
from bidensify.models import build_model
from bidensify.nn import BinaryLayer, Int8Layer, binary_layers, int8_layers
from bidensify.rewrite.plan.schema import Plan

SIZE = (3, 32, 32)
RULES = (bd.Rule("stem.0", "int8"), bd.Rule("decoder.0.*", "int8"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("demo:unet", width=8, num_classes=4, levels=2).eval()


def student(model: nn.Module) -> nn.Module:
    made = bd.bidensify(model, bd.BidensifyConfig(rules=RULES), example_inputs=torch.zeros(2, *SIZE))
    bd.calibrate(made, [torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(n)) for n in range(2)])
    return made.eval()


def test_the_plan_says_it_and_is_data() -> None:
    plan = bd.plan(network(), bd.BidensifyConfig(rules=RULES))
    chosen = {layer.path: layer for layer in plan.int8}
    assert {path for path in chosen if not path.startswith("decoder.0.")} == {"stem.0"}
    assert len(chosen) >= 3
    assert all(layer.action == "keep" and layer.reason.startswith("rule") for layer in plan.int8)
    assert "int8" in str(plan)
    assert f"; {len(chosen)} in int8" in str(plan)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(plan.to_dict(compact=True)) == plan


def test_a_layer_in_int8_stays_what_it_was() -> None:
    model = network()
    made = student(model)
    rounded = dict(int8_layers(made))
    assert set(rounded) == {layer.path for layer in made.bidensify_plan.int8}
    assert not set(rounded) & {path for path, _ in binary_layers(made)}
    state = model.state_dict()
    for path, layer in rounded.items():
        assert torch.equal(layer.weight, state[f"{path}.weight"])
        assert layer.int8 is not None
        assert float(layer.int8.high) > 0
    # The norms and activations behind it stay, too.
    twin = bd.bidensify(model, bd.BidensifyConfig(rules=tuple(bd.Rule(rule.match, "keep") for rule in RULES)))
    mine = [type(module).__name__ for module in made.modules() if not isinstance(module, Int8Layer)]
    theirs = [type(module).__name__ for path, module in twin.named_modules() if path not in rounded]
    assert [name for name in mine if name != "Int8"] == theirs
    # An original state_dict loads.
    other = student(network())
    other.load_state_dict({key: torch.zeros_like(value) for key, value in state.items()})
    assert not any(bool(layer.weight.any()) for _, layer in int8_layers(other))


def test_it_packs_and_comes_back_from_files(tmp_path: Path) -> None:
    model = network()
    made = student(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, *SIZE).to(memory_format=torch.channels_last)
    packed = bd.pack(made)
    with torch.no_grad():
        y = made(x)
        assert torch.equal(packed(x), y)
        assert float((y - model(x)).abs().max()) > 0
        for name, each in (("latent", made), ("packed", packed)):
            bd.save_pretrained(each, tmp_path / name)
            again = bd.from_pretrained(tmp_path / name, model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            assert torch.equal(again(x), y)
            assert torch.equal(copy.deepcopy(again)(x), y)
    assert len(int8_layers(packed)) == len(int8_layers(made))


def test_the_summary_counts_it() -> None:
    model = network()
    counted, whole = bd.summary(student(model), SIZE), bd.summary(model, SIZE)
    full = {row.path: row for row in whole.layers}
    rows = [row for row in counted.layers if row.int8_params]
    assert {row.path for row in rows} >= {"stem.0"}
    for row in rows:
        conv = model.get_submodule(row.path)
        assert isinstance(conv, nn.Conv2d)
        assert row.int8_params == conv.weight.numel()
        assert (row.int8_macs, row.float_macs, row.binary_macs) == (full[row.path].float_macs, 0, 0)
        bias = 0 if conv.bias is None else conv.out_channels
        assert row.bytes == conv.weight.numel() + 4 * (bias + conv.out_channels + 2)
        assert row.ops == row.int8_macs / 2 + row.elementwise
        assert row.kept.startswith("rule")
    macs = sum(counted.total(name) for name in ("binary_macs", "int8_macs", "float_macs"))
    assert macs == whole.total("float_macs")
    assert counted.to_dict()["int8_macs"] == sum(row.int8_macs for row in rows)
    assert "8-bit" in str(counted)
    assert "8-bit" not in str(whole)


def test_what_cannot_be_int8_stays_and_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.c, self.never = nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(self.a(x).relu()).relu()
            return self.head(x + self.c(x.flatten(2)).view_as(x))

    names = ("c", "never", "head")
    plan = bd.plan(Odd(), bd.BidensifyConfig(rules=tuple(bd.Rule(name, "int8") for name in names)))
    by_path = {layer.path: layer for layer in plan.layers}
    assert [by_path[name].int8 for name in names] == [False, False, True]
    assert by_path["c"].reason == "conv1d is out of reach"
    assert by_path["never"].reason == "never called in the recorded run"


def test_a_rounded_network_is_not_rewritten_again() -> None:
    made = student(network())
    for path, module in list(made.named_modules()):
        if isinstance(module, BinaryLayer):
            made.set_submodule(path, nn.Identity())
    with pytest.raises(PlanError, match="rounded to int8 already"):
        bd.bidensify(made)
    plan = bd.plan(network(), bd.BidensifyConfig(rules=RULES)).to_dict()
    for layer in plan["layers"]:
        layer["int8"] = True
    with pytest.raises(PlanError, match="in int8 and in one bit"):
        bd.rewrite.apply.model.apply_plan(network(), Plan.from_dict(plan))
