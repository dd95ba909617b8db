"""The rewritten network: same class and structure, deterministic, picklable, original weights load."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from case import check_mixed_signs
from networks import BasicBlock, Net, UpBlock
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import FormatError, PlanError
from bidensify.methods import LayerParts, LayerSpec
from bidensify.models import build_model
from bidensify.nn import BinaryLayer, RPReLU, ShiftedSign, WeightBinarizer, binary_layers
from bidensify.rewrite import Plan, apply_plan


def test_class_attributes_and_original_stay() -> None:
    model = Net()
    model.config = {"a": 1}
    before = copy.deepcopy(model.state_dict())
    student = bd.bidensify(model)
    assert isinstance(student, Net)
    assert isinstance(student.basic[0], BasicBlock)
    assert type(student.basic[0]).__name__ == "BasicBlock"
    assert isinstance(student.basic[0].conv1, nn.Conv2d)
    assert isinstance(student.basic[0].conv1, BinaryLayer)
    assert student.config == {"a": 1}
    assert not any(True for _ in binary_layers(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_inplace() -> None:
    model = Net()
    assert bd.bidensify(model, inplace=True) is model
    assert any(True for _ in binary_layers(model))


def test_optional_argument_is_fixed_with_a_clear_error() -> None:
    student = bd.bidensify(Net())
    assert isinstance(student.up2, UpBlock)
    x = torch.randn(1, 12, 4, 4)
    assert student.up2(x, 8, 8).shape == (1, 8, 8, 8)
    with pytest.raises(ValueError, match="skip was given as a Tensor, but the rewrite is of skip=None"):
        student.up2(x, 8, 8, torch.zeros(1, 1, 8, 8))


def test_every_activation_beside_a_binary_layer_learns_a_negative_side() -> None:
    torch.manual_seed(0)
    student = bd.bidensify(Net())
    activations = [module for module in student.modules() if isinstance(module, RPReLU)]
    assert activations
    assert all(module.slope.tolist() == [0.25] * module.channels for module in activations)
    student.train()(torch.randn(2, 3, 32, 32)).square().mean().backward()
    for module in activations:
        assert module.slope.grad is not None
        assert float(module.slope.grad.abs().max()) > 0
    smallest: list[float] = []
    for _, layer in binary_layers(student):
        layer.register_forward_hook(lambda m, args, out: smallest.append(args[0].min().item()))
    with torch.no_grad():
        student(torch.randn(2, 3, 32, 32))
    assert smallest
    assert max(smallest) < 0


def test_same_twice_and_in_another_process() -> None:
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.manual_seed(3)\n"
        "from networks import Net; import bidensify as bd, hashlib, json\n"
        "s = bd.bidensify(Net())\n"
        "h = hashlib.sha256()\n"
        "[h.update(v.numpy().tobytes()) for v in s.state_dict().values()]\n"
        "print(json.dumps([h.hexdigest(), list(s.state_dict()), s.bidensify_plan.to_dict()]))\n"
    )
    folder = __file__.rpartition("/")[0]
    outs = [
        subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert json.loads(outs[0]) == json.loads(outs[1])


def test_rng_state_is_left_alone() -> None:
    model = Net()
    before = torch.get_rng_state()
    bd.bidensify(model)
    assert torch.equal(before, torch.get_rng_state())


def test_pickle_and_deepcopy_give_the_same_outputs() -> None:
    student = bd.bidensify(Net()).eval()
    x = torch.randn(2, 3, 24, 40)
    expected = student(x)
    assert torch.equal(pickle.loads(pickle.dumps(student))(x), expected)
    assert torch.equal(copy.deepcopy(student)(x), expected)


def test_original_state_dict_loads_strictly() -> None:
    torch.manual_seed(1)
    source = Net()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.running_var)
    student = bd.bidensify(Net())
    threshold = student.basic[0].conv1.binarizer.b.detach().clone()
    assert not student.load_state_dict(source.state_dict()).missing_keys
    assert torch.equal(student.basic[0].conv1.latent_weight, source.basic[0].conv1.weight)
    assert torch.equal(student.basic[0].conv1.norm.weight, source.basic[0].bn1.weight)
    assert torch.equal(student.basic[0].conv1.norm.running_var, source.basic[0].bn1.running_var)
    assert torch.equal(student.up1.conv.norm.bias, source.up1.conv.bias)
    assert torch.equal(student.head.weight, source.head.weight)
    assert torch.equal(student.basic[0].conv1.binarizer.b, threshold)


def test_own_state_dict_round_trip() -> None:
    first, second = bd.bidensify(Net()), bd.bidensify(Net())
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_plan_replays_on_the_meta_device_without_a_forward_pass() -> None:
    plan = Plan.from_dict(json.loads(json.dumps(bd.plan(Net()).to_dict())))
    with torch.device("meta"):
        model = Net()
    ran = []
    model.register_forward_hook(lambda *a: ran.append(1))
    student = apply_plan(model, plan)
    assert not ran
    reference = bd.bidensify(Net())
    assert list(student.state_dict()) == list(reference.state_dict())
    student.load_state_dict(reference.state_dict(), assign=True)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(student.eval()(x), reference.eval()(x))


class RememberingWeight(WeightBinarizer):
    """A weight binarizer with a parameter and a buffer that know nothing of the network's device and precision."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(2))


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float64), ("meta", torch.float32), ("cpu", torch.bfloat16)]
)
def test_every_part_follows_the_networks_device_and_precision(device: str, dtype: torch.dtype) -> None:
    @bd.register_method("remembering", activation=RPReLU, bypass="all")
    def remembering(spec: LayerSpec, config: bd.BidensifyConfig) -> LayerParts:
        return LayerParts(ShiftedSign(spec.in_channels, spec.dim), RememberingWeight())

    plan = bd.plan(Net(), bd.BidensifyConfig(method="remembering"))
    student = apply_plan(Net().to(device=device, dtype=dtype), plan)
    values = [*student.parameters(), *(buffer for buffer in student.buffers() if buffer.is_floating_point())]
    assert sum(isinstance(part, RememberingWeight) for part in student.modules()) > 5
    assert {(value.device.type, value.dtype) for value in values} == {(device, dtype)}


def test_a_plan_of_another_model_is_refused_and_nothing_changes() -> None:
    plan = bd.plan(Net())
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(PlanError, match="of another model"):
        apply_plan(other, plan)
    wider = Net()
    wider.up1 = UpBlock(16, 8, 13)
    with pytest.raises(PlanError, match=r"up1\.conv: the plan is for"):
        apply_plan(wider, plan)
    assert not any(True for _ in binary_layers(wider))


def test_hooks_on_exchanged_modules_still_run() -> None:
    model = Net()
    seen: list[str] = []
    model.basic[0].conv1.register_forward_hook(lambda m, a, o: seen.append("conv"))
    model.stem[2].register_forward_hook(lambda m, a, o: seen.append("relu"))
    student = bd.bidensify(model)
    assert isinstance(student.stem[2], RPReLU)
    seen.clear()
    student(torch.randn(2, 3, 16, 16))
    assert sorted(seen) == ["conv", "relu"]


def test_compile_and_export() -> None:
    student = bd.bidensify(Net()).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = student(x)
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    exported = torch.export.export(student, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-5)


def test_inference_mode_gives_the_same() -> None:
    student = bd.bidensify(Net()).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(student(x), student(x.clone()))
    with torch.no_grad():
        expected = student(x)
    with torch.inference_mode():
        assert torch.allclose(student(x), expected, atol=1e-6)


def test_latent_weights_start_from_the_networks_own() -> None:
    model = Net()
    assert torch.equal(bd.bidensify(model).basic[0].conv1.latent_weight, model.basic[0].conv1.weight)


def test_shared_aliases_in_a_plain_list_follow() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            conv, norm, act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
            self.layers = [conv, norm, act]
            for number, layer in enumerate(self.layers):
                self.add_module(str(number), layer)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
            return self.last(x)

    student = bd.bidensify(Aliased())
    assert isinstance(student.layers[0], BinaryLayer)
    assert student.layers[0] is getattr(student, "0")
    assert student(torch.randn(2, 3, 8, 8)).shape == (2, 2, 8, 8)


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_untrained_rewrite_keeps_each_stages_scale(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True)
    student = bd.bidensify(model)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        original, rewritten = model.train()(x), student.train()(x)
    for stage, (a, b) in enumerate(zip(original, rewritten)):
        ratio = (b.std() / a.std()).item()
        assert 1 / 4 <= ratio <= 4, (stage, ratio)


@pytest.mark.parametrize(("method", "growth"), [("bidense", 0.5), ("bidense-in-paper", 0.0)])
def test_a_long_row_of_layers_does_not_outgrow_the_original(method: str, growth: float) -> None:
    # Branches that join behind their activations add up as a residual network's do: their variances.
    torch.manual_seed(0)
    rows = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(32)]
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *rows, nn.Conv2d(32, 2, 1))
    student = bd.bidensify(model, method=method).train()
    model.train()
    a = b = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for place, (original, rewritten) in enumerate(zip(list(model)[:-1], list(student)[:-1])):
            a, b = original(a), rewritten(b)
            assert 0.5 <= (b.std() / a.std()).item() <= 2.5 * max(place, 1) ** growth, place
    # Nor does an offset: each activation's mean would add to the one that its layer's bypass brought.
    assert abs(b.mean()) < 0.5 * b.std()


def test_calibration_mixes_signs_behind_relus() -> None:
    torch.manual_seed(0)
    student = bd.bidensify(Net())
    check_mixed_signs(student, torch.randn(4, 3, 32, 32))


def test_a_network_that_cannot_be_rewritten_says_what_it_is() -> None:
    student = bd.bidensify(build_model("demo:unet", width=8))
    for model, message in (
        (student, "is binary already"),
        (bd.pack(student), "is packed already"),
        (build_model("demo:unet", width=8).to("meta"), "its parameters are on the meta device"),
    ):
        for function in (bd.plan, bd.bidensify):
            with pytest.raises(PlanError, match=message):
                function(model)


@pytest.mark.parametrize("path", ["1", "2", "3"])
@pytest.mark.parametrize(
    ("name", "other"),
    [("padding", "valid"), ("padding", (2, 1)), ("dilation", (2, 2)), ("padding_mode", "circular")],
)
def test_a_network_of_equal_shapes_whose_windows_stand_elsewhere_is_another_one(
    path: str, name: str, other: object, tmp_path: Path
) -> None:
    def network() -> nn.Sequential:
        layers = [nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 8), (8, 8), (8, 8), (8, 2))]
        return nn.Sequential(*layers, nn.Identity())

    config = bd.BidensifyConfig(rules=[bd.Rule("2", "int8")], keep_last=True)
    student = bd.bidensify(network(), config)
    bd.save_pretrained(student, tmp_path)
    bd.from_pretrained(tmp_path, network())
    changed = network()
    changed[int(path)].padding = "same"
    bd.from_pretrained(tmp_path, changed)
    changed = network()
    setattr(changed[int(path)], name, other)
    with pytest.raises(FormatError, match=rf"{path}: the plan is for {name}="):
        bd.from_pretrained(tmp_path, changed)
    # A release that did not write them compares nothing.
    older = student.bidensify_plan.to_dict()
    for layer in older["layers"]:
        for each in ("padding", "dilation", "output_padding", "padding_mode"):
            del layer[each]
    assert len(list(binary_layers(apply_plan(changed, Plan.from_dict(older))))) == 1


def test_a_transposed_convolution_of_another_output_padding_is_another_one() -> None:
    def network(padding: int) -> nn.Sequential:
        up = nn.ConvTranspose2d(8, 8, 3, 2, padding=1, output_padding=padding)
        return nn.Sequential(nn.Conv2d(3, 8, 3), up, nn.Conv2d(8, 2, 1))

    with pytest.raises(PlanError, match=r"1: the plan is for output_padding=\(1, 1\), the network has \(0, 0\)"):
        apply_plan(network(0), bd.plan(network(1)))
