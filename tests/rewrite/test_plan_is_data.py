"""A plan is data: nothing of it is executed, and what does not fit its types or the network is refused by name."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import BidensifyError, PlanError
from bidensify.nn import binary_layers
from bidensify.rewrite import Plan, apply_plan


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, pair: list[Tensor], options: dict[str, Any], *, skip: Any = None, **more: Any) -> Tensor:
        x = F.relu(self.conv(pair[0]))
        return F.relu(x * options["it's a scale"] + pair[1]) if skip is None else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.block([x, x + 1], {"it's a scale": 2.0, "n": 1}))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# What plans of version 1 held for the block.
VERSION_1 = {
    "varying": ["pair[0]", "pair[1]", "options[\"it's a scale\"]", "options['n']"],
    "constants": {
        "type(pair).__name__": "list", "len(pair)": 2,
        "type(options).__name__": "dict", "list(options)": ["it's a scale", "n"],
        "skip": None,
    },
}  # fmt: skip


def stored() -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(json.dumps(bd.plan(Net(), example_inputs=X).to_dict()))
    return plan


def block_of(plan: dict[str, Any]) -> dict[str, Any]:
    return next(block for block in plan["blocks"] if block["path"] == "block")


def test_arguments_are_paths_and_what_is_fixed_a_table() -> None:
    block = block_of(stored())
    assert block["varying"] == [["pair", 0], ["pair", 1], ["options", "it's a scale"], ["options", "n"]]
    assert block["constants"] == [
        {"path": ["pair"], "kind": "list", "value": 2},
        {"path": ["options"], "kind": "dict", "value": ["it's a scale", "n"]},
        {"path": ["skip"], "kind": "value", "value": None},
        {"path": ["more"], "kind": "dict", "value": []},
    ]


def test_a_changed_block_takes_what_was_recorded_and_names_what_was_not() -> None:
    block = apply_plan(Net(), Plan.from_dict(stored())).block
    x, options = torch.randn(1, 8, 4, 4), {"it's a scale": 3.0, "n": 7}
    want = block([x, x], options)
    assert torch.equal(block(pair=[x, x], options=options, skip=None), want)
    assert torch.equal(block([x, x], options=dict(options)), want)
    for change, message in (
        ({"pair": (x, x)}, "pair was given as a tuple of 2, but the rewrite is of a list of 2"),
        ({"pair": [x]}, "pair was given as a list of 1, but the rewrite is of a list of 2"),
        ({"options": {"n": 1}}, "options was given as a dict of n, but the rewrite is of a dict of it's a scale, n"),
        ({"options": None}, "options was given as None"),
        ({"skip": False}, "skip was given as False, but the rewrite is of skip=None"),
        ({"skip": x}, "skip was given as a Tensor"),
        ({"extra": 1}, "more was given as a dict of extra, but the rewrite is of a dict of nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            block(**{"pair": [x, x], "options": options, **change})
    for args, kwargs in ((([x, x],), {}), (([x, x], options, 3), {}), (([x, x], options), {"pair": [x, x]})):
        with pytest.raises(TypeError, match="argument"):
            block(*args, **kwargs)


def test_plans_of_version_1_are_read() -> None:
    plan = stored()
    new = copy.deepcopy(plan)
    block_of(plan).update(copy.deepcopy(VERSION_1))
    for block in plan["blocks"]:
        names = ("channels", "dim", "method")
        block["modules"] = {name: [value[each] for each in names] for name, value in block["modules"].items()}
        block["varying"] = ["x"] if block["path"] == "" else block["varying"]
        block["constants"] = {} if block["path"] == "" else block["constants"]
    plan["version"] = 1
    plan["config"] |= {"fusion_grouping": "interleaved", "weights": "pretrained"}
    again = apply_plan(Net(), Plan.from_dict(plan))
    assert torch.equal(again.eval()(X), apply_plan(Net(), Plan.from_dict(new)).eval()(X))
    # Version 1 did not write down that **more was empty: the block's own signature says so.
    with pytest.raises(ValueError, match="more was given as a dict of extra"):
        again.block([X, X], {"it's a scale": 1.0, "n": 1}, extra=1)


EXPLOIT = "(open('{0}','w').write('x'), None)[1]"


@pytest.mark.parametrize(
    "change",
    [
        lambda block, code: block["constants"].update({code: None}),
        lambda block, code: block["constants"].update({f"type({code}).__name__": "list"}),
        lambda block, code: block["constants"].update({f"len({code})": 1}),
        lambda block, code: block["varying"].append(code),
        lambda block, code: block["varying"].append(f"pair[{code}]"),
        lambda block, code: block["varying"].append(f"pair['{code}']"),
        lambda block, code: block["varying"].append(f"pair\n[0]; {code}"),
    ],
)
def test_code_in_a_plan_of_version_1_is_refused(change: Callable[..., Any], tmp_path: Path) -> None:
    plan = stored()
    plan["version"] = 1
    for each in plan["blocks"]:
        each.update(copy.deepcopy(VERSION_1) if each["path"] == "block" else {"varying": ["x"], "constants": {}})
        each["modules"] = {
            name: [value["channels"], value["dim"], value["method"]] for name, value in each["modules"].items()
        }
    apply_plan(Net(), Plan.from_dict(copy.deepcopy(plan))).eval()(X)
    change(block_of(plan), EXPLOIT.replace("{0}", str(tmp_path / "x")))
    with pytest.raises(PlanError, match="plan again"):
        apply_plan(Net(), Plan.from_dict(plan)).eval()(X)
    assert not list(tmp_path.iterdir())


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plan: dict[str, Any]) -> None:
        where: Any = plan
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = value

    return change


def _first(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: block_of(plan)["constants"][0].update({name: value})


def _new(name: str) -> Callable[[dict[str, Any]], None]:
    """A block's new activation under another name, in its edit and in its description."""

    def change(plan: dict[str, Any]) -> None:
        block = block_of(plan)
        edit = next(edit for edit in block["edits"] if edit["action"] == "module")
        block["modules"][name] = block["modules"].pop(edit["module"])
        edit["module"] = name

    return change


DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("layers", 1, "path", value="__import__('os')"), "names \"__import__"),
        (_set("layers", 1, "norm", value="a(b)"), r"layers\[1\]\.norm='a\(b\)'.* must be the path of a module"),
        (_set("layers", 1, "norm", value="__class__"), r"layers\[1\]\.norm='__class__'"),
        (_set("layers", 1, "norm", value="stem"), "'stem' is no BatchNorm of 8 channels"),
        (_set("layers", 1, "layer_scale", value="stem.bias.data"), "'stem.bias.data' is no parameter of 8 values"),
        (_set("layers", 1, "layer_scale", value="head.bias"), "'head.bias' is no parameter of 8 values"),
        (_set("layers", 1, "kind", value="conv9d"), r"layers\[1\]\.kind='conv9d': must be one of"),
        (_set("layers", 1, "action", value="exec"), r"action='exec': must be one of 'binary', 'keep'"),
        (_set("layers", 1, "method", value="os.system"), r"method='os.system': must be a method's name"),
        (_set("layers", 1, "in_channels", value=2**70), r"in_channels='1180591620717411303424'"),
        (_set("layers", 1, "in_channels", value=True), r"in_channels='True'"),
        (_set("layers", 1, "in_channels", value=8.0), r"in_channels='8.0'"),
        (_set("layers", 1, "stride", value=[2, 1]), "block.conv: the plan is for"),
        (_set("layers", 1, "stride", value="11"), r"stride='11'"),
        (_set("layers", 1, "macs", value=float("nan")), "no plain data"),
        (_set("layers", 1, "reason", value="\x1b[2J"), "must hold no control characters"),
        (_set("layers", 1, "forward", value="x"), "unknown key"),
        (_set("notes", value=DEEP), "no plain data"),
        (_set("inputs", value="\ud800"), "plan again"),
        (_set("config", value=3), "config='3'"),
        (_set("config", "method", value=["bidense"]), "config.*must be a method's name"),
        (_set("activations", value=[{"path": "", "action": "absorbed"}]), "'absorbed' does not go with a Net"),
        (_set("activations", value=[{"path": "block", "action": "norm"}]), "'norm' does not go with a Block"),
        (_set("activations", value=[{"path": "stem", "action": "replace", "channels": 8, "method": "bidense"}]), "with a Conv2d"),
        (_set("activations", value=[{"path": "x", "action": "replace", "channels": 2**40}]), r"channels='1099511627776'"),
        (lambda plan: block_of(plan)["varying"].append(["self"]), "names 'self', which is no argument of Block.forward"),
        (lambda plan: block_of(plan)["varying"].append(["__class__"]), r"varying\[4\].*must begin with the name"),
        (lambda plan: block_of(plan)["varying"].append(["x.y"]), r"varying\[4\]"),
        (lambda plan: block_of(plan)["varying"].append([]), r"varying\[4\]"),
        (lambda plan: block_of(plan)["varying"].append("pair"), r"varying\[4\]='pair'"),
        (lambda plan: block_of(plan)["varying"].append(["pair", -1]), "no negative index"),
        (lambda plan: block_of(plan)["varying"].append(["pair", 2]), r"'pair\[2\]', which is no argument"),
        (lambda plan: block_of(plan)["varying"].append(["pair", 0]), "describes an argument of Block twice"),
        (lambda plan: block_of(plan)["varying"].append(["pair"] * 9), r"varying\[4\]"),
        (lambda plan: block_of(plan)["varying"].pop(), r"does not say what Block's argument options\['n'\] is"),
        (lambda plan: block_of(plan)["constants"].pop(0), "names 'pair\\[0\\]'|does not say what Block's argument pair is"),
        (_first("kind", "Tensor"), r"constants\[0\]\.kind='Tensor'"),
        (_first("value", 10**6), "does not go with kind='list'"),
        (_first("value", -1), "does not go with kind='list'"),
        (_first("value", ["a"]), "does not go with kind='list'"),
        (_first("value", {"a": 1}), r"constants\[0\]\.value=.*must be null"),
        (_first("path", ["ｐａｉｒ"]), "Block"),
        (_new("forward"), "cannot add an activation named 'forward'"),
        (_new("__class__"), "cannot add an activation named '__class__'"),
        (_new("conv"), "cannot add an activation named 'conv'"),
        (_new("training"), "cannot add an activation named 'training'"),
        (_new("activation_0(x) or self.activation_0"), "cannot add an activation named"),
        (lambda plan: block_of(plan)["edits"][0].update(node="__class__"), "edits its step '__class__'"),
        (lambda plan: block_of(plan)["edits"][0].update(operation="exec"), r"edits its step 'relu' \(exec\)"),
        (lambda plan: block_of(plan)["edits"][0].update(action="eval"), r"edits\[0\]\.action='eval'"),
        (lambda plan: block_of(plan)["edits"][0].update(argument=7), "no tensor argument 7"),
        (lambda plan: block_of(plan)["edits"].append(dict(block_of(plan)["edits"][0])), "edits its step|not described once"),
        (lambda plan: plan["blocks"].append(block_of(plan)), "the plan has it 2 times as a block"),
        (lambda plan: plan["layers"].append(plan["layers"][1]), "the plan has it 2 times as a layer"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused_and_the_network_left(change: Callable[..., Any], message: str) -> None:
    plan, model = stored(), Net()
    change(plan)
    with pytest.raises(PlanError, match=message):
        apply_plan(model, Plan.from_dict(plan))
    assert type(model.block) is Block
    assert not list(binary_layers(model))
    assert torch.equal(model(X), Net()(X))


def test_an_unknown_method_is_refused_and_the_network_left() -> None:
    plan, model = stored(), Net()
    plan["layers"][1]["method"] = "somebodys"
    with pytest.raises(BidensifyError, match="unknown method 'somebodys'"):
        apply_plan(model, Plan.from_dict(plan))
    assert type(model.block) is Block


def test_brackets_in_a_plan_are_no_markup() -> None:
    plan = stored()
    plan["notes"], plan["layers"][0]["reason"] = ["[bold]note[/bold] [/]"], "[red]first[/red]"
    text = str(Plan.from_dict(plan))
    assert "[bold]note[/bold] [/]" in text
    assert "[red]first[/red]" in text


def test_transformers_configuration_is_read_as_strictly(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], num_labels=2
    )
    cls = transformers.SegformerForSemanticSegmentation
    bd.pack(bd.bidensify(cls(config).eval())).save_pretrained(tmp_path / "net")
    file = tmp_path / "net" / "config.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    cls.from_pretrained(tmp_path / "net")
    block = {"path": "", "edits": [], "varying": [EXPLOIT.replace("{0}", str(tmp_path / "x"))]}
    for change, message in (
        (lambda stored: stored["plan"]["blocks"].append(block), r"blocks\[0\]\.varying\[0\]"),
        (lambda stored: stored.update(float_dtype="__dict__"), "float_dtype='__dict__'"),
        (lambda stored: stored.update(layers=[1]), "'layers' is a list"),
        (lambda stored: stored.update(plan=3), "'plan' is a int"),
    ):
        data = copy.deepcopy(whole)
        change(data["quantization_config"])
        file.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(BidensifyError, match=message):
            cls.from_pretrained(tmp_path / "net")
    assert not (tmp_path / "x").exists()


def test_mutated_plans_run_no_code(tmp_path: Path) -> None:
    """Two thousand of the same ten thousand that ``python tests/rewrite/fuzz_plans.py FOLDER 10000 300`` reads."""
    script = Path(__file__).parent / "fuzz_plans.py"
    command = [sys.executable, str(script), str(tmp_path), "2000", "60"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["seen"] == {}
    assert result["written"] == []
    assert [error for error in result["errors"] if error.startswith("UNEXPECTED")] == []
    # Both happen often: plans that are refused, and plans that still are one.
    assert result["counts"]["read"] > 1000
    assert result["counts"]["applied"] + result["counts"]["ran"] > 100
    assert result["counts"]["folders"] > 40
