"""The configuration of a rewritten transformers model, used again; checkpoints of a base model and of one with a head."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import bidensify as bd
from bidensify.errors import FormatError
from bidensify.nn import binary_layers

transformers = pytest.importorskip("transformers")
Head = transformers.SegformerForSemanticSegmentation
X = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def config(**more: Any) -> Any:
    return transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], num_labels=3, **more
    )


@pytest.fixture(scope="module")
def student() -> Any:
    torch.manual_seed(0)
    return bd.bidensify(Head(config()).eval())


def test_a_rewritten_models_configuration_loads_it_again(student: Any, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        want = student(X).logits
        for used in (student.config, copy.deepcopy(student.config), Head.from_pretrained(tmp_path).config):
            assert torch.equal(Head.from_pretrained(tmp_path, config=used).eval()(X).logits, want)
        assert torch.equal(
            Head.from_pretrained(None, config=student.config, state_dict=student.state_dict())(X).logits, want
        )


def test_teacher_and_student_of_one_configuration(tmp_path: Path) -> None:
    shared = config()
    teacher, student = Head(shared), bd.bidensify(Head(shared), inplace=True)
    assert all(module.config is student.config for module in student.modules() if hasattr(module, "config"))
    assert teacher.config is shared
    teacher.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not list(binary_layers(Head.from_pretrained(tmp_path)))


def test_a_checkpoint_that_lacks_a_binary_weight_says_so(student: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for model in (student, bd.pack(copy.deepcopy(student))):
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        for name in ("linear_fuse.weight", "linear_fuse.binarizer.a", "linear_fuse.norm.weight", "linear_fuse.bits"):
            key = f"decode_head.{name}"
            if key not in tensors:
                continue
            save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
            with pytest.raises(FormatError, match=f"lacks 1 tensors of binary layers, the first '{key}'"):
                Head.from_pretrained(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_base_models_checkpoint_goes_into_a_class_with_a_head(packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = bd.bidensify(transformers.SegformerModel(config()).eval())
    base = bd.pack(base) if packed else base
    base.save_pretrained(tmp_path)
    model = Head.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model.segformer(X).last_hidden_state, base(X).last_hidden_state)
    # The head is a new, float one.
    assert all(path.startswith("segformer.") for path, _ in binary_layers(model))
    model.save_pretrained(tmp_path / "again")
    again = Head.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(X).logits, model(X).logits)


@pytest.mark.parametrize("packed", [False, True])
def test_a_head_may_build_its_base_model_without_a_layer(packed: bool, tmp_path: Path) -> None:
    """MobileViT's base model ends in an expansion, which classes for segmentation do not build."""
    config = transformers.MobileViTConfig(
        hidden_sizes=[16, 16, 24], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], num_attention_heads=2, num_labels=3,
        image_size=32, aspp_out_channels=16,
    )  # fmt: skip
    torch.manual_seed(0)
    base = bd.bidensify(transformers.MobileViTModel(config).eval(), example_inputs=torch.randn(1, 3, 64, 64))
    assert any(layer.path == "conv_1x1_exp.convolution" for layer in base.bidensify_plan.binary)
    saved = bd.pack(base) if packed else base
    saved.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headed = transformers.MobileViTForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert "mobilevit.conv_1x1_exp.convolution" not in dict(headed.named_modules())
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        want = saved(x, output_hidden_states=True).hidden_states
        got = headed.mobilevit(x, output_hidden_states=True).hidden_states
    assert len(got) == len(want) > 1
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_with_a_head_goes_into_the_base_class(student: Any, packed: bool, tmp_path: Path) -> None:
    whole = bd.pack(copy.deepcopy(student)) if packed else student
    whole.save_pretrained(tmp_path)
    base = transformers.SegformerModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(X).last_hidden_state, whole.segformer(X).last_hidden_state)


def test_a_checkpoint_that_lacks_a_float_tensor_is_told(student: Any, tmp_path: Path, recwarn: Any) -> None:
    from safetensors.torch import load_file, save_file

    student.save_pretrained(tmp_path)
    Head.from_pretrained(tmp_path)
    assert not [w for w in recwarn if "drawn at random" in str(w.message)]
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["decode_head.classifier.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(
        UserWarning, match=r"1 full-precision ones, the first 'decode_head.classifier.weight': they were drawn"
    ):
        Head.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="2 full-precision ones"):
        Head.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)


def test_a_float_model_of_a_rewritten_ones_configuration_says_how_it_loads(student: Any, tmp_path: Path) -> None:
    Head(student.config).save_pretrained(tmp_path)
    with pytest.raises(
        FormatError, match=r"holds none of what binary layers have.*take quantization_config out of config.json"
    ):
        Head.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    plain = {key: value for key, value in json.loads(file.read_text()).items() if key != "quantization_config"}
    file.write_text(json.dumps(plain))
    assert not list(binary_layers(Head.from_pretrained(tmp_path)))


@pytest.mark.parametrize("packed", [False, True])
def test_the_base_of_a_rewritten_model_saved_alone(packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = bd.bidensify(transformers.SegformerForImageClassification(config()).eval())
    whole = bd.pack(whole) if packed else whole
    whole.base_model.save_pretrained(tmp_path)
    for kind in (transformers.SegformerModel, transformers.SegformerForImageClassification):
        again = kind.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(again.base_model(X).last_hidden_state, whole.base_model(X).last_hidden_state)
