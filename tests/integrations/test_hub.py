"""Libraries' own save_pretrained and from_pretrained; loads that are not strict."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bidensify as bd
from bidensify.errors import FormatError
from bidensify.nn import binary_layers

smp = pytest.importorskip("segmentation_models_pytorch")
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def base(classes: int = 2) -> Any:
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, decoder_channels=(16, 16, 8, 8, 8), classes=classes).eval()


@pytest.fixture(scope="module")
def student() -> Any:
    student = bd.bidensify(base())
    with torch.no_grad():
        for _, layer in binary_layers(student):
            layer.norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    return student


@pytest.mark.parametrize("state", ["latent", "packed", "packed in float16"])
def test_smp_saves_and_loads_what_was_rewritten(student: Any, state: str, tmp_path: Path) -> None:
    model = copy.deepcopy(student)
    if state != "latent":
        model = bd.pack(model) if state == "packed" else bd.deploy.pack(model, float_dtype=torch.float16)
    before = copy.deepcopy(model.config)
    model.save_pretrained(tmp_path)
    assert model.config == before
    assert "plan" not in (tmp_path / "README.md").read_text()
    with torch.no_grad():
        want = model(X)
        for again in (smp.Unet.from_pretrained(tmp_path), smp.from_pretrained(tmp_path)):
            assert type(again) is type(model)
            assert torch.equal(again(X), want)
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(smp.from_pretrained(tmp_path / "again")(X), want)


def test_a_full_precision_model_is_saved_and_loaded_as_ever(tmp_path: Path) -> None:
    model = base()
    model.save_pretrained(tmp_path)
    assert not any("bidensify" in key for key in json.loads((tmp_path / "config.json").read_text()))
    again = smp.from_pretrained(tmp_path)
    assert not list(binary_layers(again))
    assert torch.equal(again(X), model(X))


def test_without_bidensify_the_class_refuses(student: Any, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path)
    code = f"import segmentation_models_pytorch as smp; smp.Unet.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bidensify:resnet18" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", f"import bidensify; {code}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda config: config.pop("_bidensify"), "Unet is full-precision at"),
        (lambda config: config["_bidensify"].update(plan=[]), "holds no plan"),
        (lambda config: config["_bidensify"].update(layers=[]), "damaged 'layers'"),
        (lambda config: config["_bidensify"].update(layers={"a": {}}), "its packed layers and its plan differ"),
        (lambda config: config["_bidensify"]["plan"]["layers"][1].update(path="nowhere"), "nowhere"),
    ],
)
def test_damaged_marks_are_refused(student: Any, damage: Any, message: str, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        smp.Unet.from_pretrained(tmp_path)


def test_a_file_that_lacks_a_tensor_is_refused_though_the_library_is_not_strict(student: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    student.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["decoder.blocks.0.conv1.0.binarizer.k"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="decoder.blocks.0.conv1.0.binarizer.k"):
        smp.Unet.from_pretrained(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_load_that_is_not_strict_refuses_the_weights_of_a_rewritten_network(student: Any, packed: bool) -> None:
    state = (bd.pack(student) if packed else student).state_dict()
    with pytest.raises(FormatError, match=r"rewrote.*Unet is full-precision at .*Rewrite the network first"):
        base().load_state_dict(state, strict=False)
    with pytest.raises(FormatError, match="rewrote"):
        torch.nn.DataParallel(base()).load_state_dict({f"module.{k}": v for k, v in state.items()}, strict=False)


@pytest.mark.parametrize("method", sorted(set(bd.available_methods()) - {"bibert", "bit", "bivit"}))
def test_a_load_that_is_not_strict_is_not_silent_whatever_the_method(method: str) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))

    state = bd.bidensify(make(), bd.BidensifyConfig(method=method)).state_dict()
    # Some methods add nothing but a norm, which other libraries' layers may have too: these are loaded, and it is said.
    told = pytest.warns(UserWarning, match=r"\('1.norm.weight'\).*full-precision at '1'.*if bidensify rewrote it")
    norm_alone = method in ("bnn", "bireal", "dorefa", "irnet")
    with told if norm_alone else pytest.raises(FormatError, match="rewrote.*full-precision at '1'"):
        make().load_state_dict(state, strict=False)


def test_other_loads_that_are_not_strict_go_on(student: Any) -> None:
    state, fresh = student.state_dict(), base()
    other = bd.bidensify(base())
    assert not other.load_state_dict({k: v for k, v in state.items() if "head" not in k}, strict=False).unexpected_keys
    assert torch.equal(other.decoder.blocks[0].conv1[0].latent_weight, student.decoder.blocks[0].conv1[0].latent_weight)
    # The original's weights into the rewritten network, and float parts alone into a float one.
    other.load_state_dict(fresh.state_dict(), strict=False)
    head = {k: v for k, v in state.items() if k.startswith("segmentation_head")}
    assert fresh.load_state_dict(head, strict=False).missing_keys

    class Normed(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 1)
            self.activation = nn.PReLU()

    # Somebody's own layer with parts of these names.
    nn.Sequential(Normed()).load_state_dict(nn.Sequential(Normed()).state_dict(), strict=False)


def test_timms_loaders_refuse_too(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from timm.models import load_checkpoint

    student = bd.bidensify(timm.create_model("resnet18", num_classes=5))
    file = tmp_path / "student.safetensors"
    from safetensors.torch import save_file

    save_file(student.state_dict(), file)
    with pytest.raises(FormatError, match="ResNet is full-precision at 'layer1.0.conv1'"):
        load_checkpoint(timm.create_model("resnet18", num_classes=5), str(file), strict=False)
    with pytest.raises((FormatError, RuntimeError)):
        load_checkpoint(timm.create_model("resnet18", num_classes=5), str(file))
    # Another number of classes makes timm's load_pretrained one that is not strict.
    with pytest.raises(FormatError, match="ResNet is full-precision at 'layer1.0.conv1'"):
        timm.create_model(
            "resnet18", pretrained=True, num_classes=3, pretrained_cfg_overlay={"file": str(file), "num_classes": 5}
        )
    again = bd.bidensify(timm.create_model("resnet18", num_classes=5))
    load_checkpoint(again, str(file))
    assert torch.equal(again.eval()(X), student.eval()(X))
