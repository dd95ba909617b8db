"""Each figure against an independent measurement; what is kept on disk; what is shown."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

import bidensify as bd
from bidensify.errors import ConfigError, DataError, FormatError
from bidensify.losses.terms import kl_loss
from bidensify.models import build_model
from bidensify.nn import BinaryLayer, binary_layers
from bidensify.nn.used_weight import copy_model
from bidensify.precisions import Sensitivity
from bidensify.precisions.findings import units_of
from bidensify.precisions.measure import Tally, distance_of
from bidensify.tasks import SegmentationTask
from bidensify.train import evaluate
from tests.tiny import Colours

TASK = SegmentationTask(3)
DATA = Colours(10, seed=1)


def networks(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    teacher = build_model("demo:unet", width=4, num_classes=3, levels=2).eval()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.running_mean) * 0.1  # type: ignore[arg-type]
            module.running_var = torch.rand_like(module.running_var) + 0.5  # type: ignore[arg-type]
    # Each class's score of mean 0 and deviation 1, so that every class is predicted somewhere.
    with torch.no_grad():
        scores = torch.cat([teacher(x) for x in batches(10)])
        mean, deviation = scores.mean((0, 2, 3)), scores.std((0, 2, 3))
        head = teacher.get_submodule("head")
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        head.weight.div_(deviation.view(-1, 1, 1, 1))
        head.bias.sub_(mean).div_(deviation)
    student = bd.bidensify(teacher, example_inputs=torch.zeros(1, 3, 16, 16))
    bd.calibrate(student, [torch.stack([DATA[i]["image"] for i in range(8)])])
    return student.eval(), teacher


def batches(size: int) -> list[Tensor]:
    return [torch.stack([DATA[i]["image"] for i in range(n, min(n + size, 10))]) for n in range(0, 10, size)]


def distance(model: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        parts = [len(x) * float(kl_loss(model(x), teacher(x))) for x in batches(4)]
    return sum(parts) / 10


def rounded(teacher: nn.Module, path: str, inputs: list[Tensor]) -> float:
    """The distance of the network with one layer's weight and input rounded by torch's operators."""
    changed = copy_model(teacher).eval()
    conv = changed.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    low, high = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
    step = (max(high, 0.0) - min(low, 0.0)) / 255
    zero = round(-min(low, 0.0) / step)
    with torch.no_grad():
        steps = conv.weight.abs().amax((1, 2, 3)) / 127
        none = torch.zeros(len(steps), dtype=torch.int32)
        conv.weight.copy_(torch.fake_quantize_per_channel_affine(conv.weight, steps, none, 0, -127, 127))
    conv.register_forward_pre_hook(lambda _, args: torch.fake_quantize_per_tensor_affine(args[0], step, zero, 0, 255))
    return distance(changed, teacher)


def test_in_the_teacher_each_layer_alone_is_binary() -> None:
    student, teacher = networks()
    images = batches(4)[:2]
    found = bd.sensitivity(
        student,
        DATA,
        teacher,
        task=TASK,
        batch_size=4,
        calibration=images,
        groups=["decoder"],
        precisions=["act_bits 2", "int8"],
        quiet=True,
    )
    assert found.teacher is not None
    assert found.teacher.metric == pytest.approx(evaluate(teacher, TASK, DATA)["miou"])
    assert found.student is None
    assert {row.name for row in found.layers} == {path for path, _ in binary_layers(student)}
    fresh = dict(binary_layers(bd.bidensify(teacher, example_inputs=torch.zeros(1, 3, 16, 16))))
    for row in found.layers:
        changed = copy_model(teacher).eval()
        conv, layer = changed.get_submodule(row.name), fresh[row.name].eval()
        seen: list[Tensor] = []
        handle = conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
        with torch.no_grad():
            for x in images:
                changed(x)
        handle.remove()
        with torch.no_grad():
            layer.binarizer.begin_calibration()
            for x in seen:
                layer.binarizer(x)
            layer.binarizer.end_calibration()
            wanted = [conv(x) for x in seen]
            given = [layer.conv_only(layer.binarizer(x)) for x in seen]

        def moments(ys: list[Tensor]) -> tuple[Tensor, Tensor]:
            mean = torch.stack([y.mean((0, 2, 3)) for y in ys]).mean(0)
            variance = torch.stack([y.var((0, 2, 3), correction=0) for y in ys]).mean(0)
            return mean.view(-1, 1, 1), variance.view(-1, 1, 1)

        (mean, variance), (to, spread) = moments(given), moments(wanted)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            y = layer.conv_only(layer.binarizer(args[0]))  # noqa: B023
            return (y - mean) / variance.sqrt() * spread.sqrt() + to  # noqa: B023

        conv.register_forward_hook(hook)
        assert row.measured["binary"].metric == pytest.approx(evaluate(changed, TASK, DATA)["miou"], abs=2e-3)
        assert row.measured["binary"].distance == pytest.approx(distance(changed, teacher), rel=1e-3)
        assert found.gain(row) == pytest.approx(found.teacher.metric - row.measured["binary"].metric)
        assert found.gain(row, "float", "distance") == pytest.approx(row.measured["binary"].distance)
        # Two bits lose less than one, and cost more.
        assert row.measured["act_bits 2"].distance < row.measured["binary"].distance  # type: ignore[operator]
        assert found.added(row, "act_bits 2", "ops") > 0
        # Eight bits lose next to nothing, by torch's own operators too.
        assert row.measured["int8"].distance == pytest.approx(rounded(teacher, row.name, seen), rel=0.1, abs=1e-5)
        assert row.measured["int8"].distance < 0.1 * row.measured["binary"].distance  # type: ignore[operator]
        sizes = [row.costs[name] for name in ("binary", "act_bits 2", "int8", "float")]
        assert max(sizes[0].ops, sizes[2].ops) < sizes[3].ops
        assert sizes[0].bytes < sizes[2].bytes < sizes[3].bytes
        assert sizes[2].macs == 0
    (group,) = found.groups
    assert group.layers == tuple(row.name for row in found.layers if row.name.startswith("decoder."))
    assert found.gain(group, "float", "distance") > 0.01


def test_in_the_student_each_layer_alone_is_float() -> None:
    student, teacher = networks()
    images = batches(4)[:2]
    options: dict[str, Any] = {"batch_size": 4, "calibration": images, "groups": ["decoder"], "quiet": True}
    before = {name: value.clone() for name, value in student.state_dict().items()}
    found = bd.sensitivity(student, DATA, teacher, task=TASK, around="student", **options)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert found.student is not None
    assert found.student.metric == pytest.approx(evaluate(student, TASK, DATA)["miou"])
    assert found.student.distance == pytest.approx(distance(student, teacher), rel=1e-5)
    for row in found.rows:
        changed = copy_model(student).eval()
        layers = [changed.get_submodule(path) for path in row.layers]
        for layer in layers:
            assert isinstance(layer, BinaryLayer)
            layer.binarizer.enabled = layer.binarize_weights = False
        # The library's own calibration, of which nothing but these layers' norms is taken over.
        other = copy_model(changed)
        for module in other.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = any(module is other.get_submodule(f"{path}.norm") for path in row.layers)
        bd.calibrate(other, images, thresholds=False)
        for path in row.layers:
            changed.get_submodule(f"{path}.norm").load_state_dict(other.get_submodule(f"{path}.norm").state_dict())
        assert row.measured["float"].metric == pytest.approx(evaluate(changed, TASK, DATA)["miou"], abs=2e-3)
        assert row.measured["float"].distance == pytest.approx(distance(changed, teacher), rel=1e-3)


def test_costs_are_those_of_summary() -> None:
    student, teacher = networks()
    found = bd.sensitivity(student, DATA, teacher, task=TASK, quiet=True)
    latent, full = bd.summary(student, (3, 16, 16)), bd.summary(teacher, (3, 16, 16))
    for cost in ("ops", "bytes"):
        layers = sum(getattr(row.costs["binary"], cost) for row in found.layers)
        assert layers + getattr(found.rest, cost) == pytest.approx(latent.total(cost))
        assert getattr(found.full, cost) == full.total(cost)
        # Float in place of binary costs at least what the full-precision network costs.
        assert sum(found.added(row, "float", cost) for row in found.layers) + latent.total(cost) >= full.total(cost)
    assert sum(row.costs["float"].macs for row in found.layers) + found.rest.macs == full.total("float_macs")


class Stopping(Colours):
    """Stops at a read, as a killed process does."""

    limit = 10**9

    def load(self, index: int) -> dict[str, Tensor]:
        type(self).limit -= 1
        if type(self).limit < 0:
            raise KeyboardInterrupt
        return super().load(index)


def test_a_killed_analysis_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = networks()
    data, images = Stopping(10, seed=1), batches(4)[:1]
    options: dict[str, Any] = {
        "task": TASK,
        "batch_size": 2,
        "calibration": images,
        "trained": True,
        "groups": None,
        "quiet": True,
    }
    whole = bd.sensitivity(student, data, teacher, **options)
    file = tmp_path / "sensitivity.json"
    monkeypatch.setattr(Stopping, "limit", 17)
    with pytest.raises(KeyboardInterrupt):
        bd.sensitivity(student, data, teacher, cache=file, **options)
    assert not file.exists()
    part = tmp_path / "sensitivity.json.part"
    assert json.loads(part.read_text())["batches"] == 3
    monkeypatch.setattr(Stopping, "limit", 10**9)
    runs: list[int] = []
    teacher.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    went_on = bd.sensitivity(student, data, teacher, cache=file, **options)
    # Two batches were left, each as it is and with every change; costs are counted by runs of two samples, of the teacher and
    # of a student in each of two precisions.
    assert runs.count(2) == 2 * (1 + len(whole.rows)) + 3
    assert went_on.rows == whole.rows
    assert (went_on.teacher, went_on.student) == (whole.teacher, whole.student)
    assert not part.exists()
    monkeypatch.setattr(Stopping, "limit", 11)  # a look at each sample tells the data apart, one more gives the size
    assert bd.sensitivity(student, data, teacher, cache=file, **options) == went_on


def test_what_was_kept_of_other_weights_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    options: dict[str, Any] = {"task": TASK, "cache": file, "quiet": True}
    first = bd.sensitivity(*_args(0), **options)
    second = bd.sensitivity(*_args(1), **options)
    assert first.key != second.key
    assert Sensitivity.load(file) == second


def test_a_table_of_milliseconds_measures_no_image_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, data, teacher = _args(0)
    file, table = tmp_path / "sensitivity.json", tmp_path / "table.json"
    first = bd.sensitivity(student, data, teacher, task=TASK, cache=file, quiet=True)
    assert first.rest.ms is None
    monkeypatch.setattr("bidensify.precisions.run.measure", lambda *_: pytest.fail("measured again"))
    paths = [row.name for row in first.layers]
    for rest in (2.0, 3.0):
        times = {path: {"binary": 0.5 + number, "float": 4.0 + number} for number, path in enumerate(paths)}
        table.write_text(json.dumps({"rest": rest, "layers": times}))
        timed = bd.sensitivity(student, data, teacher, task=TASK, cache=file, milliseconds=table, quiet=True)
        assert timed.rest.ms == rest
        assert [(row.costs["binary"].ms, row.costs["float"].ms) for row in timed.layers] == [
            (times[path]["binary"], times[path]["float"]) for path in paths
        ]
        assert [row.measured for row in timed.rows] == [row.measured for row in first.rows]
        assert Sensitivity.load(file) == timed


def test_sums_are_of_the_process_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait for it: joining sums with them would wait for ever."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    tally = Tally(TASK, distance_of(TASK)[1], torch.device("cpu"))
    assert isinstance(tally.metrics, Metric)
    monkeypatch.setattr(tally.metrics, "dist_sync_fn", lambda *_, **__: pytest.fail("joined with other processes"))
    sample = DATA[0]
    batch = {name: value[None] for name, value in sample.items()}
    tally.add(batch["image"], batch, None)
    assert 0 <= tally.result()[0] <= 1


class Changed(torch.utils.data.Dataset[Any]):
    """DATA with one sample changed."""

    def __init__(self, **changes: Tensor) -> None:
        self.changes = changes

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return {**DATA[index], **(self.changes if index == 4 else {})}


def test_what_was_kept_of_other_data_or_of_another_task_is_not_taken(tmp_path: Path) -> None:
    student, teacher = networks()
    file = tmp_path / "sensitivity.json"
    options: dict[str, Any] = {"calibration": batches(4)[:1], "quiet": True}
    others: list[tuple[Any, Any]] = [
        (DATA, TASK),
        (Changed(mask=(DATA[4]["mask"] + 1) % 3), TASK),
        (Changed(image=DATA[4]["image"].flip(-1)), TASK),
        (DATA, SegmentationTask(3, dice=0.5)),
    ]
    keys = set()
    for data, task in others:
        fresh = bd.sensitivity(student, data, teacher, task=task, **options)
        kept = bd.sensitivity(student, data, teacher, task=task, cache=file, **options)
        assert kept.teacher == fresh.teacher
        assert kept.rows == fresh.rows
        assert bd.sensitivity(student, data, teacher, task=task, cache=file, **options) == kept
        keys.add(kept.key)
    assert len(keys) == len(others)


def _args(seed: int) -> tuple[nn.Module, Any, nn.Module]:
    student, teacher = networks(seed)
    return student, DATA, teacher


def test_files_tables_and_plots(tmp_path: Path) -> None:
    student, teacher = networks()
    found = bd.sensitivity(student, DATA, teacher, task=TASK, groups=None, quiet=True)
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found
    # A metric that is no number, as of images in which no class is.
    first = found.layers[0]
    none = first.measured["binary"].model_copy(update={"metric": math.nan})
    row = first.model_copy(update={"measured": {**first.measured, "binary": none}})
    found.model_copy(update={"rows": (row, *found.rows[1:])}).save(tmp_path / "nan.json")
    json.loads((tmp_path / "nan.json").read_text(), parse_constant=pytest.fail)
    assert math.isnan(Sensitivity.load(tmp_path / "nan.json").layers[0].measured["binary"].metric)
    lines = found.to_markdown("bytes").splitlines()
    shown = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith(("| decoder", "| encoder"))]
    worth = {
        row.name: found.gain(row, "float", "distance") / found.added(row, "float", "bytes") for row in found.layers
    }
    assert shown == sorted(worth, key=lambda name: -worth[name])
    assert "| encoder.0 |" in found.to_markdown(groups=True)
    assert "miou" in str(found)
    for name, start in (("p.png", b"\x89PNG"), ("p.svg", b"<?xml")):
        found.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ConfigError, match=r"'p.gif' must end in one of"):
        found.plot(Path("p.gif"))
    with pytest.raises(ConfigError, match="no milliseconds are known"):
        found.table("ms")
    with pytest.raises(ConfigError, match="cost='opps' is none of"):
        found.table("opps")
    text = (tmp_path / "s.json").read_text()
    edits = (('"version": 1', '"version": 2'), ('"around": "teacher"', '"around": "x"'), ("{", "["))
    for broken in (text[:100], *(text.replace(*edit, 1) for edit in edits)):
        (tmp_path / "s.json").write_text(broken)
        with pytest.raises(FormatError, match="no sensitivity of this release"):
            Sensitivity.load(tmp_path / "s.json")
    with pytest.raises(ConfigError, match="there is no file"):
        Sensitivity.load(tmp_path / "none.json")


def test_what_cannot_be_measured_is_told() -> None:
    student, teacher = networks()
    for args, options, message in (
        ((teacher, DATA), {}, "the student is float; give a latent network"),
        ((student, DATA, student), {}, "the teacher is latent"),
        ((student, DATA), {"around": "teacher"}, "give teacher="),
        ((student, DATA, teacher), {"around": "x"}, "around='x' must be"),
        ((student, DATA, teacher), {"precisions": ["flout"]}, "there is no precision 'flout'.*float"),
        ((student, DATA, teacher), {"groups": ["decodr"]}, "the group 'decodr' holds no binary layer.*decoder"),
        ((student, [{"image": torch.zeros(3, 16, 16)}], teacher), {}, "do not say which task"),
    ):
        with pytest.raises(ConfigError, match=message):
            bd.sensitivity(*args, quiet=True, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="without samples"):
        bd.sensitivity(student, [], teacher, task=TASK, quiet=True)  # type: ignore[arg-type]


def test_groups_are_blocks_and_stages() -> None:
    paths = ["a.0.x", "a.0.y", "a.1.x", "b.0.x.conv", "b.0.x.more", "c"]
    found = {unit.name: unit.layers for unit in units_of(paths) if unit.group}
    assert found == {
        "a": ("a.0.x", "a.0.y", "a.1.x"),
        "a.0": ("a.0.x", "a.0.y"),
        "b": ("b.0.x.conv", "b.0.x.more"),
    }
    assert [unit.name for unit in units_of(paths, [])] == paths
