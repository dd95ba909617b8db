from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import yaml

from bidensify.errors import ConfigError
from bidensify.recipe import Recipe, load_recipe


def mistakes(tiny: ModuleType, *overrides: str, **changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(tiny.recipe(**changes), overrides)
    return str(caught.value)


def test_defaults_and_shorthand(tiny: ModuleType) -> None:
    stage = {"name": "s", "binarize": "all", "epochs": 1, "lr": "1e-3", "losses": {"kl": 2}}
    recipe = load_recipe(tiny.recipe(stages=[stage]))
    assert isinstance(recipe, Recipe)
    assert recipe.stages[0].lr == 1e-3
    assert {name: term.weight for name, term in recipe.stages[0].terms.items()} == {"task": 1, "kl": 2}
    assert recipe.stages[0].distils
    without = load_recipe(tiny.recipe(stages=[{**stage, "losses": {"task": None, "kl": 2}}]))
    assert list(without.stages[0].terms) == ["kl"]
    assert load_recipe(without.to_dict()).stages == without.stages
    assert recipe.config().method == "bidense"


@pytest.mark.parametrize("frame", ["bidense", "paper", "teacher"])
def test_a_method_in_a_frame_by_its_name(tiny: ModuleType, frame: str) -> None:
    recipe = load_recipe(tiny.recipe(), [f"binarize.method=react-in-{frame}"])
    assert recipe.config().method == f"react-in-{frame}"
    assert load_recipe(recipe.to_dict()).config() == recipe.config()


def test_misspelt_key_names_the_near_one(tiny: ModuleType) -> None:
    stages = [
        {"name": "a", "binarize": "none", "epochs": 1, "lr": 1},
        {"name": "b", "binarize": "none", "epoch": 1, "lr": 1},
    ]
    text = mistakes(tiny, stages=stages)
    assert "stages[1].epoch: unknown key; did you mean 'epochs'?" in text
    assert "stages[1].epochs: missing" in text


def test_every_mistake_is_reported_with_its_path(tiny: ModuleType) -> None:
    text = mistakes(
        tiny, "data.batch_size=eight", "optimizer.clip=-1", "emma.decay=0.9", "stages[0].losses.kl.temprature=2"
    )
    assert "4 mistakes" in text
    assert "data.batch_size: input should be a valid integer" in text
    assert "got 'eight'" in text
    assert "optimizer.clip: input should be greater than 0, got -1" in text
    assert "emma: unknown key; did you mean 'ema'?" in text
    assert "stages[0].losses.kl.temprature: unknown key; did you mean 'temperature'?" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train.lenght=3", "data.train.lenght: unknown key; did you mean 'length'?"),
        ("data.val.name=scene", "data.val.name: there is no data set 'scene'; did you mean 'scenes'?"),
        ("task.name=segmentatoin", "task.name: there is no task 'segmentatoin'; did you mean 'segmentation'?"),
        ("task.dise=1", "task.dise: unknown key; did you mean 'dice'?"),
        ("binarize.metod=bnn", "binarize.metod: unknown key; did you mean 'method'?"),
        ("binarize.method=bidens", "binarize.method: there is no method 'bidens'; did you mean 'bidense'"),
        ("binarize.act_scale=tensor", "binarize: "),
        ("binarize={method: xnor, act_bits: 2}", "binarize.act_bits=2: the method 'xnor' has activations of 1 bit"),
        ("binarize.act_bits=3", "binarize: BidensifyConfig: act_bits=3 must be 1 or 2"),
        ("stages[0].losses.kll=1", "stages[0].losses.kll: unknown key; did you mean 'kl'?"),
        ("stages[0].losses.kl.temperature=0", "stages[0].losses.kl.temperature: input should be greater than 0, got 0"),
        ("stages[0].losses.features=1", "stages[0].losses.features.layers: missing"),
        ("stages[0].losses={task: null}", "stages[0].losses: no loss is left"),
        ("evaluate.stride=[4,4]", "evaluate.stride=[4, 4] without evaluate.window"),
        ("data.accumulate=3", "data: batch_size 8 is not a multiple of accumulate 3"),
        ("stages=[]", "stages: list should have at least 1 item"),
        ("seed=.nan", "seed: "),
        ("stages[3].lr=1", "override 'stages[3].lr=1': 3 is not an index below 1"),
        ("name.x=1", "override 'name.x=1': there is no section"),
        ("seed", "override 'seed': write path=value"),
        ("model.options={a: 1, a: 2}", "line 1: the key 'a' was given in line 1 already"),
        ("teacher.stages=[{name: t, binarize: all, epochs: 1, lr: 1}]", "stages[0].binarize is 'all'"),
    ],
)
def test_mistakes(tiny: ModuleType, override: str, expected: str) -> None:
    assert expected in mistakes(tiny, override)


def test_file_with_duplicate_keys_and_another_mistake(tiny: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(tiny.recipe()) + "seed: 1\nseed: 2\nprecison: bf16\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    assert "the key 'seed' was given in line" in str(caught.value)
    assert "precison: unknown key; did you mean 'precision'?" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("\xff", "read as text"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=expected):
        load_recipe(file)


def test_merge_keys_are_no_duplicates(tiny: ModuleType, tmp_path: Path) -> None:
    data = tiny.recipe()
    data.pop("data")
    file = tmp_path / "r.yaml"
    text = "data:\n  train: &t {name: scenes, split: train, length: 3}\n  val: {<<: *t, split: val}\n  size: [16, 16]\n"
    file.write_text(yaml.safe_dump(data) + text)
    recipe = load_recipe(file)
    assert recipe.data.val.split == "val"
    assert recipe.data.val.options == {"length": 3}


def test_yaml_never_builds_objects(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(file)


def test_missing_file_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "scenes.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"does not exist.*scenes\.yaml"):
        load_recipe(tmp_path / "scene.yaml")


def test_resolved_recipe_loads_to_itself(tiny: ModuleType, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe(**tiny.STUDENT), ["binarize.method=bnn", "data.train.length=5"])
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(file).to_dict() == recipe.to_dict()
    assert recipe.to_dict()["binarize"]["act_scale"] == "per_tensor"


def test_overrides_leave_the_source_alone(tiny: ModuleType) -> None:
    source = tiny.recipe()
    assert load_recipe(source, ["data.size=[8, 8]", "ema={decay: 0.5}"]).data.size == (8, 8)
    assert source["data"]["size"] == [16, 16]
    assert load_recipe(load_recipe(source), ["seed=7"]).seed == 7


def test_teacher_recipe(tiny: ModuleType) -> None:
    teacher = {
        "stages": [{"name": "t", "binarize": "none", "epochs": 3, "lr": 0.1}],
        "optimizer": {"weight_decay": 0.5},
        "ema": None,
        "augment": {"hflip": False},
    }
    recipe = load_recipe(tiny.recipe(**tiny.STUDENT, teacher=teacher)).for_teacher()
    assert [stage.name for stage in recipe.stages] == ["t"]
    assert recipe.optimizer.weight_decay == 0.5
    assert recipe.ema is None
    assert not recipe.data.augment.hflip
    assert load_recipe(recipe.to_dict()) == recipe
    with pytest.raises(ConfigError, match=r"no teacher\.stages"):
        load_recipe(tiny.recipe()).for_teacher()
