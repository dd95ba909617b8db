"""A run's folder from elsewhere is data: loading it runs nothing that only its files name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bidensify.errors import BidensifyError, ConfigError
from bidensify.recipe import load_recipe
from bidensify.train import finetune, load_run, run_recipe

RECIPE: dict[str, Any] = {
    "name": "x", "model": {"source": "demo:unet", "options": {"num_classes": 8, "width": 8}}, "device": "cpu",
    "data": {"train": {"name": "scenes", "split": "train", "length": 4}, "val": {"name": "scenes", "split": "val",
             "length": 2}, "size": [32, 32], "batch_size": 2},
    "task": {"name": "segmentation"}, "teacher": {"stages": [{"name": "t", "binarize": "none", "epochs": 1, "lr": 1e-3}]},
    "stages": [{"name": "s", "binarize": "all", "epochs": 1, "lr": 1e-3, "losses": {"kl": 1}}],
    "calibrate": {"batches": 1}, "log": {"tensorboard": False},
}  # fmt: skip
EVIL = "from pathlib import Path\nPath(__file__).with_name('trap').touch()\ndef build(**options): raise SystemExit\n"

# What a hostile recipe.yaml says, over a good one.
HOSTILE: dict[str, dict[str, Any]] = {
    "imports": {"imports": ["evil"]},
    "imports a file": {"imports": ["evil.py"]},
    "imports the standard library": {"imports": ["this", "antigravity"]},
    "factory": {"model": {"source": "evil:build"}},
    "factory in a file": {"model": {"source": "evil.py:build"}},
    "system": {"model": {"source": "os:system", "options": {"command": "touch trap"}}},
    "popen": {"model": {"source": "subprocess:Popen", "options": {"args": ["touch", "trap"]}}},
    "exec": {"model": {"source": "builtins:exec", "options": {"source": "open('trap', 'w')"}}},
    "pickle": {"model": {"source": "timm:resnet18", "options": {"checkpoint_path": "trap.pth", "features_only": False}}},
    "remote code": {"model": {"source": "transformers:evil", "options": {"trust_remote_code": True}}},
    "method": {"binarize": {"method": "evil"}},
    "loss": {"stages": [{"name": "s", "binarize": "all", "epochs": 1, "lr": 1, "losses": {"evil": 1}}]},
    "data set": {"data": {"train": {"name": "evil", "split": "train"}, "val": {"name": "evil", "split": "val"}}},
    "task": {"task": {"name": "evil"}},
}  # fmt: skip

WATCH = """
import json, os, sys
from pathlib import Path
from bidensify.errors import BidensifyError
from bidensify.train import load_run
good, hostile, trusted = sys.argv[1], sys.argv[2].split(os.pathsep), sys.argv[3]
import timm, torchmetrics, transformers  # what a registered source's library does when it is imported is not the file's doing
load_run(good)  # whatever loading imports is imported now
events, watching = [], False
def hook(event, args):
    if not watching:
        return
    writes = event == "open" and isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
    makes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or makes or event in ("import", "exec", "compile", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
                                    "os.rename", "os.remove", "os.mkdir", "socket.connect", "pickle.find_class"):
        events.append([event, str(args[0])[:200]])
sys.addaudithook(hook)
found = {}
for folder in hostile:
    events.clear()
    watching = True
    try:
        load_run(folder)
        said = None
    except BidensifyError as error:
        said = str(error)
    watching = False
    found[folder] = [said, list(events)]
trapped = Path("trap").exists()
events.clear()
watching = True
try:
    load_run(trusted, trust=True)
except (BidensifyError, SystemExit):
    pass
watching = False
print(json.dumps([found, trapped, events]))
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    run_recipe(load_recipe(RECIPE), folder / "s", train_teacher=True, quiet=True)
    return folder / "s"


def hostile(good: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of the good run whose recipe says something else."""
    folder.mkdir(parents=True)
    for name in ("plan.json", "model.safetensors", "result.json"):
        (folder / name).write_bytes((good / name).read_bytes())
    recipe = yaml.safe_load((good / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    return folder


def test_nothing_is_run(good: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    work = tmp_path / "work"
    work.mkdir()
    (work / "evil.py").write_text(EVIL)
    (work / "trap.pth").write_bytes(b"cos\nsystem\n(S'touch trap'\ntR.")
    (work / "evil").mkdir()
    (work / "evil" / "config.json").write_text('{"auto_map": {"AutoConfig": "code.Config"}, "model_type": "evil"}')
    (work / "evil" / "code.py").write_text(EVIL)
    folders = {name: hostile(good, tmp_path / "runs" / str(i), c) for i, (name, c) in enumerate(HOSTILE.items())}
    arguments = [str(good), ":".join(map(str, folders.values())), str(folders["factory"])]
    code = f"import sys; sys.path.insert(0, {str(work)!r})\n{WATCH}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=work, capture_output=True, text=True, check=True, timeout=300
    )
    found, trapped, trusted = json.loads(done.stdout.splitlines()[-1])
    allowed = {"pickle": ("import", "exec", "compile"), "remote code": ("import", "exec", "compile")}
    for name, folder in folders.items():
        said, events = found[str(folder)]
        assert said is not None, name
        # A registered source may bring in its library, and nothing else.
        bad = [event for event in events if event[0] not in allowed.get(name, ())]
        assert bad == [], (name, bad)
        assert not any("evil" in event[1] or "trap" in event[1] for event in events), name
    for name in ("imports", "imports a file", "factory", "factory in a file", "system", "popen", "exec"):
        said = found[str(folders[name])][0]
        assert "trust=True in Python, --trust on the command line" in said, name
    assert "'evil:build'" in found[str(folders["factory"])][0]
    assert not trapped
    # The watch sees what it watches for.
    assert {event for event, what in trusted if "evil" in what or "trap" in what} >= {"compile", "exec", "open"}
    assert (work / "trap").exists()


def test_what_the_user_gives_is_trusted(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_own.py").write_text(
        "from bidensify.models import build_model\ndef net(**options): return build_model('demo:unet', **options)\n"
    )
    monkeypatch.chdir(tmp_path)
    folder = hostile(
        good, tmp_path / "run", {"model": {"source": "mine_own:net", "options": {"num_classes": 8, "width": 8}}}
    )
    with pytest.raises(ConfigError, match=r"names the network 'mine_own:net', which is somebody's own code"):
        load_run(folder)
    assert "mine_own" not in sys.modules
    expected = load_run(good)[0].state_dict()
    model, recipe = load_run(folder, trust=True)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert recipe.build_model() is not None
    # Imported or not, a module that only the file names is not called.
    with pytest.raises(ConfigError, match="somebody's own code"):
        load_run(folder)
    # A network that is given needs no code of the file, and its recipe does not become trusted by that.
    base = load_recipe(RECIPE).build_model()
    _, recipe = load_run(folder, base)
    with pytest.raises(ConfigError, match="somebody's own code"):
        recipe.build_model()
    with pytest.raises(ConfigError, match="somebody's own code"):
        load_recipe(recipe, ["seed=3"]).build_model()


def test_own_modules_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set, a loss, a method and a source of one's own, from the working directory."""
    (tmp_path / "our_package").mkdir()
    (tmp_path / "our_package" / "__init__.py").write_text("")
    (tmp_path / "our_package" / "parts.py").write_text(
        "import torch\n"
        "import bidensify as bd\n"
        "from bidensify.data import DataInfo, DenseDataset\n"
        "from bidensify.losses import Loss\n"
        "from bidensify.methods import get_method\n"
        "from bidensify.models import build_model\n"
        "from torchvision import tv_tensors\n"
        "@bd.register_data_set('ours')\n"
        "class Ours(DenseDataset):\n"
        "    def __init__(self, split, transforms=None):\n"
        "        super().__init__(transforms)\n"
        "        self.info = DataInfo(2, ('a', 'b'), ((0, 0, 0), (255, 255, 255)))\n"
        "    def __len__(self): return 4\n"
        "    def load(self, index):\n"
        "        image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))\n"
        "        return {'image': tv_tensors.Image(image), 'mask': tv_tensors.Mask((image[0] > 127).long())}\n"
        "@bd.register_loss('squared')\n"
        "class Squared(Loss):\n"
        "    power: int = 2\n"
        "    def value(self, outputs, target, task):\n"
        "        return (task.logits(outputs.student) - task.logits(outputs.teacher)).abs().pow(self.power).mean()\n"
        "@bd.register_method('ours')\n"
        "def ours(spec, config): return get_method('bnn').parts(spec, config)\n"
        "@bd.register_source('ours')\n"
        "def net(name, width=8): return build_model('demo:unet', num_classes=2, width=width)\n"
    )
    monkeypatch.chdir(tmp_path)
    stages = [
        {"name": "s", "binarize": "all", "epochs": 1, "lr": 1e-3, "losses": {"squared": {"weight": 0.5, "power": 4}}}
    ]
    recipe = {
        **RECIPE, "imports": ["our_package.parts"], "model": {"source": "ours:net", "options": {"width": 8}},
        "binarize": {"method": "ours"}, "stages": stages, "seed": 3,
        "data": {"train": {"name": "ours", "split": "train"}, "val": {"name": "ours", "split": "val"}, "size": [32, 32],
                 "batch_size": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = (
        "from bidensify.train import run_recipe, load_run\n"
        "run_recipe('recipe.yaml', 'run', train_teacher=True, quiet=True)\n"
        "import sys; del sys.modules['our_package.parts']\n"
        "try: load_run('run')\n"
        "except ValueError as error: print(error)\n"
        "print(type(load_run('run', trust=True)[0]).__name__)\n"
    )
    # As the console script does it: the working directory is not on the path by itself.
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "imports 'our_package.parts', which only this file names" in done.stdout
    assert "UNet" in done.stdout
    assert "registered again" in done.stderr  # the module was run a second time
    record = json.loads((tmp_path / "run" / "result.json").read_text())["history"][0]
    assert list(record["losses"]) == ["task", "squared"]
    assert (
        yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["stages"][0]["losses"]["squared"]["power"] == 4
    )


def test_a_module_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"the module 'no_such_thing' cannot be imported .*working directory"):
        load_recipe({**RECIPE, "imports": ["no_such_thing"]})
    with pytest.raises(ConfigError, match=r"imports\[0\]: input should be a valid string, got 3"):
        load_recipe({**RECIPE, "imports": [3]})


@pytest.mark.parametrize(
    "text",
    [
        "name: &a [*a]",
        "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi")
        ),
        "a: &a {k: 1}\n" + "".join(
            f"{y}: &{y} {{<<: [{', '.join(['*' + x] * 9)}], k{y}: 1}}\n" for x, y in zip("abcdefgh", "bcdefghi")
        ),
        "name: " + "[" * 5000,
        "name: " + "x" * (1 << 21),
        "a: &a '" + "x" * 100_000 + "'\nb: [" + ", ".join(["*a"] * 5000) + "]",
        "name: !!python/object/apply:os.system ['touch trap']",
    ],
    ids=["itself", "bomb", "merge bomb", "deep", "long", "repeated", "object"],
)  # fmt: skip
def test_yaml_that_grows(good: Path, tmp_path: Path, text: str) -> None:
    folder = hostile(good, tmp_path / "run", {})
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_run(folder)


@pytest.mark.parametrize(
    "plan", ["{", "[]", "{}", '{"version": 99}', "[" * 100_000, '{"layers": "evil"}', '{"layers": [{"path": "a"}]}']
)
def test_plans_that_are_none(good: Path, tmp_path: Path, plan: str) -> None:
    folder = hostile(good, tmp_path / "run", {})
    (folder / "plan.json").write_text(plan)
    with pytest.raises(BidensifyError):
        load_run(folder)


def test_weights_that_are_code(good: Path, tmp_path: Path) -> None:
    folder = hostile(good, tmp_path / "run", {})
    (folder / "model.safetensors").write_bytes(b"cos\nsystem\n(S'touch trap'\ntR.")
    with pytest.raises(BidensifyError, match="cannot be read|more than tensors"):
        load_run(folder)
    assert finetune is not None
