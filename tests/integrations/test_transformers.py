"""from_pretrained(quantization_config=...), save_pretrained and loading again: the same network to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bidensify as bd
from bidensify.deploy import packed_layers
from bidensify.errors import ConfigError, FormatError, PlanError
from bidensify.nn import BinaryLayer

transformers = pytest.importorskip("transformers")
from zoo.transformers import MODELS  # noqa: E402

Auto = transformers.AutoModelForSemanticSegmentation
CONVNEXT = "upernet"
SEGFORMER = "transformers:SemanticSegmentation/SegformerForSemanticSegmentation"


def upernet() -> nn.Module:
    """Block edits, a LayerScale, linear layers on NHWC maps, a head that is idle in evaluation mode."""
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[16, 24, 32, 32], depths=[1, 1, 1, 1], image_size=64, out_features=stages
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=24, auxiliary_channels=16, pool_scales=[1, 2], num_labels=5
    )
    return transformers.UperNetForSemanticSegmentation(config).eval()  # type: ignore[no-any-return]


CONFIG = bd.BidensifyConfig(rules=(bd.Rule("decode_head.psp*", "keep"), bd.Rule("re:.*dwconv.*", "bnn")))
DOUBLE = bd.BidensifyConfig(residual="double", act_scale="none")


def build(key: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[key]().eval() if key == SEGFORMER else upernet()
    # Statistics and scales as training leaves them, so that a tensor in the wrong place shows.
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point() and value.dim() == 1:
                value.copy_(
                    torch.rand_like(value) + 0.5 if "var" in name or "weight" in name else torch.rand_like(value)
                )
    return model


def image(model: nn.Module, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(model.dtype)


def logits(model: nn.Module) -> torch.Tensor:
    """Outputs with every tensor in fresh memory: what torch computes depends on how a mapped file happens to align."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.clone()
        return model(image(model)).logits  # type: ignore[no-any-return]


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    a, b = got.state_dict(), wanted.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
    assert got.bidensify_plan.to_dict() == wanted.bidensify_plan.to_dict()
    assert type(got).__name__ == type(wanted).__name__
    assert not got.training
    assert torch.equal(logits(got), logits(wanted))


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for key in (CONVNEXT, SEGFORMER):
        folders[key] = tmp_path_factory.mktemp("float")
        build(key).save_pretrained(folders[key])
    return folders


@pytest.fixture(scope="module")
def latent_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    student = bd.bidensify(build(CONVNEXT))
    bd.calibrate(student, [image(student)])
    folder = tmp_path_factory.mktemp("latent")
    student.eval().save_pretrained(folder)
    return folder, student


@pytest.mark.parametrize(("key", "config"), [(CONVNEXT, CONFIG), (CONVNEXT, DOUBLE), (SEGFORMER, bd.BidensifyConfig())])
def test_a_float_checkpoint_becomes_what_bidensify_makes(
    key: str, config: bd.BidensifyConfig, float_dir: dict[str, Path]
) -> None:
    loaded = Auto.from_pretrained(float_dir[key], quantization_config=config)
    assert_same(loaded, bd.bidensify(build(key), config))
    assert loaded.bidensify_plan.config == config


@pytest.mark.parametrize("given", [{}, {"method": "bnn"}, {"config": {"method": "bnn"}}])
def test_the_configuration_may_be_a_dictionary(given: dict[str, Any], float_dir: dict[str, Path]) -> None:
    loaded = Auto.from_pretrained(float_dir[SEGFORMER], quantization_config={"quant_method": "bidensify", **given})
    assert {layer.method for layer in loaded.bidensify_plan.binary} == {"bnn" if given else "bidense"}


@pytest.mark.parametrize("way", ["from_pretrained", "bidensify"])
@pytest.mark.parametrize("key", [CONVNEXT, SEGFORMER])
def test_saved_and_loaded_again(key: str, way: str, float_dir: dict[str, Path], tmp_path: Path) -> None:
    config = bd.BidensifyConfig(act_scale="none")
    if way == "bidensify":
        student = bd.bidensify(build(key), config)
    else:
        student = Auto.from_pretrained(float_dir[key], quantization_config=config)
    bd.calibrate(student, [image(student)])
    student.eval().save_pretrained(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(Auto.from_pretrained(tmp_path), student)
    # By its own class, and once more from what was loaded.
    again = type(build(key)).from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert_same(Auto.from_pretrained(tmp_path / "again"), student)


def test_loading_draws_no_data_and_runs_nothing(latent_dir: tuple[Path, nn.Module], monkeypatch: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a stored plan is replayed: nothing is recorded or run")

    monkeypatch.setattr("bidensify.rewrite.api.record", refuse)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", refuse)
    assert any(isinstance(module, BinaryLayer) for module in Auto.from_pretrained(latent_dir[0]).modules())


def test_sharded(latent_dir: tuple[Path, nn.Module], tmp_path: Path) -> None:
    student = latent_dir[1]
    student.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    assert_same(Auto.from_pretrained(tmp_path), student)


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}])
def test_device_map(where: Any, latent_dir: tuple[Path, nn.Module], float_dir: dict[str, Path]) -> None:
    assert_same(Auto.from_pretrained(latent_dir[0], device_map=where), latent_dir[1])
    if where != "auto":
        return
    rewritten = Auto.from_pretrained(float_dir[SEGFORMER], device_map=where, quantization_config=bd.BidensifyConfig())
    assert_same(rewritten, bd.bidensify(build(SEGFORMER)))


def test_offloaded_to_disk(latent_dir: tuple[Path, nn.Module], float_dir: dict[str, Path], tmp_path: Path) -> None:
    spread = {"backbone": "disk", "decode_head": "cpu", "auxiliary_head": "cpu"}
    loaded = Auto.from_pretrained(latent_dir[0], device_map=spread, offload_folder=tmp_path)
    with torch.no_grad():
        x = image(latent_dir[1])
        torch.testing.assert_close(loaded(x).logits, latent_dir[1](x).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="device_map='cpu'"):
        Auto.from_pretrained(
            float_dir[CONVNEXT], device_map=spread, offload_folder=tmp_path, quantization_config=bd.BidensifyConfig()
        )


def test_bfloat16(latent_dir: tuple[Path, nn.Module], float_dir: dict[str, Path], tmp_path: Path) -> None:
    loaded = Auto.from_pretrained(latent_dir[0], dtype=torch.bfloat16)
    assert_same(loaded, Auto.from_pretrained(latent_dir[0]).to(torch.bfloat16))
    rewritten = Auto.from_pretrained(
        float_dir[CONVNEXT], dtype=torch.bfloat16, quantization_config=bd.BidensifyConfig()
    )
    assert {value.dtype for value in rewritten.parameters()} == {torch.bfloat16}
    assert_same(rewritten, bd.bidensify(build(CONVNEXT).to(torch.bfloat16)))
    rewritten.save_pretrained(tmp_path)
    assert_same(Auto.from_pretrained(tmp_path), rewritten)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packed(dtype: torch.dtype | None, latent_dir: tuple[Path, nn.Module], tmp_path: Path) -> None:
    packed = bd.pack(latent_dir[1], float_dtype=dtype)
    packed.save_pretrained(tmp_path)
    again = Auto.from_pretrained(tmp_path)
    assert len(packed_layers(again)) == len(packed_layers(packed)) > 15
    for name, value in packed.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert packed(x).logits.dtype == again(x).logits.dtype == torch.float32
        torch.testing.assert_close(again(x).logits, packed(x).logits, rtol=1e-4, atol=1e-5)
    assert not again.hf_quantizer.is_trainable
    assert not again.hf_quantizer.is_qat_trainable
    small, large = tmp_path / "model.safetensors", latent_dir[0] / "model.safetensors"
    assert small.stat().st_size < large.stat().st_size / 5
    # What was loaded packed is saved packed.
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(Auto.from_pretrained(tmp_path / "again")(x).logits, again(x).logits)


def test_packing_what_was_loaded(latent_dir: tuple[Path, nn.Module], tmp_path: Path) -> None:
    loaded = Auto.from_pretrained(latent_dir[0])
    bd.pack(loaded).save_pretrained(tmp_path)
    assert packed_layers(Auto.from_pretrained(tmp_path))
    # Packing gives a copy: the latent model still saves as one.
    loaded.save_pretrained(tmp_path / "latent")
    assert_same(Auto.from_pretrained(tmp_path / "latent"), latent_dir[1])


def test_bidensify_save_and_load_work_too(latent_dir: tuple[Path, nn.Module], tmp_path: Path) -> None:
    for name, model in (("latent", latent_dir[1]), ("packed", bd.pack(latent_dir[1]))):
        bd.save_pretrained(model, tmp_path / name)
        again = bd.from_pretrained(tmp_path / name, build(CONVNEXT))
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / f"{name}-transformers")
        assert torch.equal(logits(Auto.from_pretrained(tmp_path / f"{name}-transformers")), logits(model))


def test_the_original_keeps_its_configuration() -> None:
    model = build(SEGFORMER)
    bd.bidensify(model)
    assert not hasattr(model.config, "quantization_config")


def test_another_number_of_classes(latent_dir: tuple[Path, nn.Module]) -> None:
    loaded = Auto.from_pretrained(latent_dir[0], num_labels=9, ignore_mismatched_sizes=True)
    assert loaded(image(loaded)).logits.shape[1] == 9
    assert torch.isfinite(loaded(image(loaded)).logits).all()


def test_a_head_that_the_checkpoint_lacks_is_initialised_as_the_model_does(
    float_dir: dict[str, Path], tmp_path: Path
) -> None:
    backbone = build(SEGFORMER).segformer
    backbone.save_pretrained(tmp_path)
    loaded = Auto.from_pretrained(tmp_path, quantization_config=bd.BidensifyConfig())
    weight = loaded.decode_head.linear_fuse.latent_weight
    assert 0.5 < weight.std().item() / loaded.config.initializer_range < 2


def edit(folder: Path, change: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data["quantization_config"])
    (folder / "config.json").write_text(json.dumps(data))


class TestDamage:
    @pytest.fixture
    def folder(self, latent_dir: tuple[Path, nn.Module], tmp_path: Path) -> Path:
        latent_dir[1].save_pretrained(tmp_path)
        return tmp_path

    def test_no_plan(self, folder: Path) -> None:
        edit(folder, lambda data: data.pop("plan"))
        with pytest.raises(FormatError, match="holds no plan"):
            Auto.from_pretrained(folder)

    def test_newer_version(self, folder: Path) -> None:
        edit(folder, lambda data: data.update(stored_version=9))
        with pytest.raises(FormatError, match="stored_version=9"):
            Auto.from_pretrained(folder)

    @pytest.mark.parametrize("key", ["plan", "layers"])
    def test_not_an_object(self, key: str, folder: Path) -> None:
        edit(folder, lambda data: data.update({key: [1]}))
        with pytest.raises(FormatError, match=f"{key!r} is a list"):
            Auto.from_pretrained(folder)

    def test_packed_layers_of_another_plan(self, folder: Path) -> None:
        edit(folder, lambda data: data.update(layers={"backbone.x": {}}))
        with pytest.raises(FormatError, match="differ at"):
            Auto.from_pretrained(folder)

    def test_plan_of_another_model(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        other = tmp_path_factory.mktemp("other")
        bd.bidensify(build(SEGFORMER)).save_pretrained(other)
        stored = json.loads((other / "config.json").read_text())["quantization_config"]
        edit(folder, lambda data: data.update(stored))
        with pytest.raises(PlanError, match="which this network does not have"):
            Auto.from_pretrained(folder)

    def test_tensors_missing(self, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        gone = [name for name in tensors if name.endswith("binarizer.k")][:3]
        save_file({k: v for k, v in tensors.items() if k not in gone}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(FormatError, match=r"lacks 3 tensors of binary layers, the first .*binarizer\.k"):
            Auto.from_pretrained(folder)


def test_bad_configurations_are_refused_before_weights_are_read(float_dir: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((float_dir[SEGFORMER] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ConfigError, match="unknown method 'bidence'"):
        Auto.from_pretrained(tmp_path, quantization_config=bd.BidensifyConfig(method="bidence"))
    with pytest.raises(ConfigError, match="did you mean 'residual'"):
        Auto.from_pretrained(tmp_path, quantization_config={"quant_method": "bidensify", "residuals": "keep"})


def test_a_rule_that_matches_nothing_is_an_error_here_too(float_dir: dict[str, Path]) -> None:
    config = bd.BidensifyConfig(rules=(bd.Rule("decoder_head.*"),))
    with pytest.raises(ConfigError, match=r"'decoder_head\.\*' matches no"):
        Auto.from_pretrained(float_dir[SEGFORMER], quantization_config=config)
