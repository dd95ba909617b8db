"""Allocations against brute force; budgets against ``summary`` of what is rewritten; monotone in the budget."""

import ctypes
import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bidensify as bd
from bidensify.errors import ConfigError, FormatError
from bidensify.models import build_model
from bidensify.nn import binary_layers
from bidensify.precisions import Allocation, Cost, Measured, Row, Sensitivity, allocation, read_budget
from bidensify.precisions.costs import costs_of
from bidensify.precisions.milliseconds import LayerTimes
from bidensify.precisions.precision import PRECISIONS, Precision
from bidensify.precisions.program import choose
from bidensify.tasks import SegmentationTask
from tests.tiny import Colours

FULL = Cost(macs=1000, ops=2000, bytes=4000)


@pytest.fixture(autouse=True)
def middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A precision between binary and float, so that there are three."""
    monkeypatch.setitem(PRECISIONS, "middle", Precision("middle", {"bypass": True}, None))


def synthetic(layers: list[list[tuple[float, float, float, float]]], student: float | None = None) -> Sensitivity:
    """Of layers with (loss of the metric, MACs, bytes, ms) in each of binary, middle and float (which loses nothing)."""
    rows = []
    for number, options in enumerate(layers):
        costs, measured = {}, {}
        for name, (loss, macs, size, ms) in zip(("binary", "middle", "float"), options):
            costs[name] = Cost(macs=macs, ops=2 * macs, bytes=size, ms=ms)
            if name != "float":
                measured[name] = Measured(metric=0.9 - loss, distance=2 * loss)
        rows.append(Row(name=f"l{number}", layers=(f"l{number}",), depth=0, macs=1, costs=costs, measured=measured))
    return Sensitivity(
        network="Net", fingerprint="", config=bd.BidensifyConfig().to_dict(), around="teacher", metric="miou",
        higher_is_better=True, distance="kl", samples=1, input_size=(3, 8, 8), teacher=Measured(metric=0.9, distance=0.0),
        student=None if student is None else Measured(metric=student, distance=1.0),
        rest=Cost(macs=10, ops=20, bytes=40, ms=1.0), full=FULL, rows=tuple(rows),
    )  # fmt: skip


amount = st.floats(0, 100, allow_subnormal=False).map(lambda value: round(value, 3))
option = st.tuples(st.floats(0, 0.2).map(lambda value: round(value, 4)), amount, amount, amount)
instances = st.lists(st.lists(option, min_size=3, max_size=3), min_size=1, max_size=5)


def every(found: Sensitivity) -> list[tuple[dict[str, str], float, Cost]]:
    """Each choice, what it loses of the metric, and its cost."""
    result = []
    for names in itertools.product(("binary", "middle", "float"), repeat=len(found.rows)):
        cost, lost = found.rest, 0.0
        for row, name in zip(found.rows, names):
            cost = cost.plus(row.costs[name])
            best = 0.9 - row.measured["binary"].metric
            loss = 0.0 if name == "float" else 0.9 - row.measured[name].metric
            # A precision that loses more than binary, or gains on float, is noise: losses lie between 0 and what they are.
            lost += max(0.0, loss if name != "binary" else best)
        result.append((dict(zip([row.name for row in found.rows], names)), lost, cost))
    return result


def attempt(found: Sensitivity, **bounds: Any) -> Allocation | str:
    """The allocation, or what is said where there is none."""
    try:
        return allocation(found, read_budget(bounds))
    except ConfigError as error:
        return str(error)


@settings(max_examples=60, deadline=None)
@given(instances, st.floats(0.05, 1), st.floats(0.05, 1), st.booleans())
def test_the_loss_is_the_least_that_the_budget_allows(layers: Any, macs: float, size: float, both: bool) -> None:
    found = synthetic(layers)
    bounds = {"macs": macs, **({"bytes": size} if both else {}), "by": "metric"}
    fits = [
        (lost, names) for names, lost, cost in every(found)
        if cost.macs <= macs * FULL.macs and (not both or cost.bytes <= size * FULL.bytes)
    ]  # fmt: skip
    got = attempt(found, **bounds)
    if isinstance(got, str):
        nothing = "nothing to rewrite" in got and any(set(names.values()) == {"float"} for _, names in fits)
        assert nothing or not fits, got
        return
    assert got.shares["macs"] <= macs * (1 + 1e-9)
    assert not both or got.shares["bytes"] <= size * (1 + 1e-9)
    assert 0.9 - got.expected == pytest.approx(min(lost for lost, _ in fits), abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(instances, st.floats(0, 0.3), st.sampled_from(["macs", "bytes", "ms"]), st.floats(0.7, 0.9))
def test_the_cost_is_the_least_that_keeps_the_accuracy(layers: Any, accuracy: float, aim: str, student: float) -> None:
    found = synthetic(layers, student)
    choices = every(found)
    whole = next(lost for names, lost, _ in choices if set(names.values()) == {"binary"})
    scale = (0.9 - student) / whole if whole else 0.0
    # The least cost, with and without the choices whose loss is the bound to rounding.
    low, high = (
        min(getattr(cost, aim) for _, lost, cost in choices if scale * lost <= accuracy + slip)
        for slip in (1e-9 * accuracy + 1e-12, -1e-9 * accuracy)
    )
    got = attempt(found, accuracy=accuracy, minimize=aim)
    if isinstance(got, str):
        assert "nothing to rewrite" in got
        return
    assert got.trained
    assert 0.9 - got.expected <= accuracy * (1 + 1e-9) + 1e-9
    assert low - 1e-3 <= getattr(got.cost, aim) <= high + 1e-3


@settings(max_examples=30, deadline=None)
@given(instances, st.lists(st.floats(1.5, 400), min_size=2, max_size=5))
def test_more_milliseconds_never_lose_more(layers: Any, bounds: list[float]) -> None:
    found, lost = synthetic(layers), []
    for ms in sorted(bounds):
        got = attempt(found, ms=ms)
        if isinstance(got, str):
            lost.append(0.0 if "nothing to rewrite" in got else 10.0)
            continue
        assert got.cost.ms is not None
        assert got.cost.ms <= ms * (1 + 1e-9)
        lost.append(0.9 - got.expected)
    assert all(later <= earlier + 1e-7 for earlier, later in itertools.pairwise(lost))


class Residual(nn.Module):
    """Shortcuts with and without a projection, a transposed convolution, LayerNorm, a linear layer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.one, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.short = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(8, 16, 1, 2)
        self.up, self.head = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 4, 1)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = (x + self.norm(self.one(x))).relu()
        y = self.up((self.down(x) + self.short(x)).relu())
        y = x + self.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(y)


@pytest.mark.parametrize("name", ["unet", "residual"])
def test_budgets_hold_by_summary_of_what_is_rewritten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PRECISIONS, "middle")
    torch.manual_seed(0)
    model = (build_model("demo:unet", width=8, num_classes=3, levels=2) if name == "unet" else Residual()).eval()
    student, size = bd.bidensify(model, example_inputs=torch.zeros(1, 3, 16, 16)), (3, 16, 16)
    costs = costs_of({"binary": student}, model, size)
    paths = [path for path, _ in binary_layers(student)]
    assert len(paths) >= 4
    generator = torch.Generator().manual_seed(1)
    losses = [float(value) for value in torch.rand(len(paths), generator=generator)]
    rows = tuple(
        Row(name=path, layers=(path,), depth=0, macs=0, costs=costs.of([path]),
            measured={"binary": Measured(metric=1 - loss)})
        for path, loss in zip(paths, losses)
    )  # fmt: skip
    found = synthetic([]).model_copy(
        update={"rows": rows, "rest": costs.rest, "full": costs.full, "distance": None, "input_size": size,
                "teacher": Measured(metric=1.0), "config": student.bidensify_plan.config.to_dict()}
    )  # fmt: skip
    full, least = bd.summary(model, size), bd.summary(student, size)
    fields = {"macs": "float_macs", "ops": "ops", "bytes": "bytes"}
    for cost, field in fields.items():
        low = least.total(field) / full.total(field)
        for step in (0.02, 0.5):
            bound = low + step * (1 - low)
            config = bd.allocate(found, {cost: bound}, network=model, quiet=True)
            made = bd.bidensify(model, config, example_inputs=torch.zeros(1, 3, 16, 16))
            assert bd.summary(made, size).total(field) / full.total(field) <= bound
            assert len(config.rules) < len(paths)
            # The sum of the layers' costs is not below what summary counts, so that the figures of the table are safe ones.
            got = allocation(found, read_budget({cost: bound}))
            assert (
                got.shares[cost]
                >= bd.summary(bd.bidensify(model, got.config), size).total(field) / full.total(field) - 1e-9
            )


def test_what_cannot_be_allocated_is_told() -> None:
    found = synthetic([[(0.1, 0, 1, 1), (0.05, 0, 2, 2), (0, 100, 3, 3)]])
    for budget, message in (
        ({}, "budget: a budget needs a bound: macs, ops, bytes, ms, accuracy"),
        ({"opps": 1}, "budget.opps: unknown key.*ops"),
        ({"ops": 0}, r"budget.ops=0: .*greater than 0"),
        ({"bytes": 2}, r"budget.bytes=2: .*less than or equal to 1"),
        ({"ops": 1, "minimize": "ms"}, "minimize='ms' goes with accuracy"),
        ({"ops": 1, "precisions": ["int7"]}, "there is no precision 'int7'"),
        ({"bytes": 0.001}, r"no choice of precisions keeps bytes 0.001 \(at least 0.01025 by itself\)"),
        ({"ops": 1}, "every layer may stay in full precision"),
        ({"accuracy": 0.1, "by": "distance"}, "needs to know what a trained student lost"),
    ):
        with pytest.raises(ConfigError, match=message):
            bd.allocate(found, budget, quiet=True)
    with pytest.raises(ConfigError, match="measure around the teacher"):
        bd.allocate(found.model_copy(update={"around": "student"}), ops=0.5)
    with pytest.raises(ConfigError, match="needs the measured milliseconds"):
        bd.allocate(found.model_copy(update={"rest": Cost(macs=1, ops=1, bytes=1)}), ms=3)


def test_int8_everywhere_is_nothing_to_rewrite() -> None:
    found = synthetic([[(0.1, 0, 1, 1), (0.05, 0, 2, 2), (0, 100, 3, 3)]] * 2)
    rows = [
        row.model_copy(update={"costs": {**row.costs, "int8": row.costs["middle"]},
                               "measured": {**row.measured, "int8": Measured(metric=0.9, distance=0.0)}})
        for row in found.rows
    ]  # fmt: skip
    found = found.model_copy(update={"rows": tuple(rows)})
    with pytest.raises(ConfigError, match="every layer may have int8 or full precision.*OpenVINO"):
        allocation(found, read_budget({"macs": 0.05}))
    # Half of them, by a budget that has room for one.
    got = allocation(found, read_budget({"bytes": 0.0108, "precisions": ["int8"]}))
    assert sorted(got.chosen.values()) == ["binary", "int8"]
    assert [rule.action for rule in got.config.rules] == ["int8"]


def test_what_is_expected_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = synthetic([[(0.1, 0, 1, 1), (0.05, 0, 2, 2), (0, 100, 3, 3)]] * 2, student=0.7)
    config = bd.allocate(found, macs=0.11)
    assert [(rule.match, rule.action) for rule in config.rules] in (
        [("l0", "keep"), ("l1", {"bypass": True})],
        [("l0", {"bypass": True}), ("l1", "keep")],
    )
    text = capsys.readouterr().out
    assert "2 layers: 1 float, 1 middle" in text
    assert "11.0 % of macs" in text
    # The student lost 0.2 where both layers lost 0.1 each; a quarter of that is left.
    assert "expected miou: 0.8500, full precision 0.9000 (by what the trained student lost)" in text


@pytest.mark.parametrize(("higher", "student"), [(True, 0.95), (True, 0.7), (False, 0.85), (False, 1.1)])
def test_a_student_better_than_its_teacher_is_expected_to_be_as_much_better(higher: bool, student: float) -> None:
    layers = [[(0.1, 0.0, 1.0, 1.0), (0.05, 50.0, 2.0, 2.0), (0.0, 100.0, 3.0, 3.0)]] * 2
    found = synthetic(layers, student).model_copy(update={"higher_is_better": higher})
    if not higher:
        worse = {
            name: Measured(metric=0.9 + loss, distance=2 * loss) for name, loss in (("binary", 0.1), ("middle", 0.05))
        }
        found = found.model_copy(
            update={"rows": tuple(row.model_copy(update={"measured": worse}) for row in found.rows)}
        )
    assert allocation(found, read_budget({"macs": 0.01})).chosen == {"l0": "binary", "l1": "binary"}
    assert allocation(found, read_budget({"macs": 0.01})).expected == pytest.approx(student)
    if (student > 0.9) == higher:
        # Nothing is lost by binary layers, so that the cheapest keeps any accuracy.
        assert set(allocation(found, read_budget({"accuracy": 0.001, "minimize": "bytes"})).chosen.values()) == {
            "binary"
        }


def test_milliseconds_of_bench_and_of_a_file_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("demo:unet", width=4, num_classes=3, levels=1).eval()
    student = bd.bidensify(model, example_inputs=torch.zeros(1, 3, 16, 16))
    paths = [path for path, _ in binary_layers(student)]
    file = tmp_path / "layers.json"
    rows = [
        {
            "layer": path,
            "shape": "3x3",
            "threads": threads,
            "output": [8, 8],
            "ms": {"float": 4.0 / threads, "packed": 1.0 / threads, "openvino int8": 3.0 / threads},
        }
        for path in paths
        for threads in (1, 2)
    ]
    file.write_text(json.dumps(rows))
    costs = costs_of({"binary": student}, model, (3, 16, 16), file)
    assert costs.rest.ms == 0
    assert costs.full.ms == 4 * len(paths)
    assert {name: cost.ms for name, cost in costs.of(paths[:2]).items()} == {"binary": 2, "int8": 6, "float": 8}
    two = [{**row, "geometry": "conv2d 3x3 4->4 act_bits 2", "ms": {"float": 2.0, "packed": 1.5}} for row in rows[1::2]]
    file.write_text(json.dumps(rows[1::2] + two))
    times = LayerTimes.load(file, paths)
    assert times.layers[paths[0]] == {"float": 2.0, "binary": 0.5, "int8": 1.5, "act_bits 2": 1.5}
    own = {"rest": 3.0, "layers": {path: {"binary": 1.0, "float": 2.0} for path in paths}}
    file.write_text(json.dumps(own))
    assert costs_of({"binary": student}, model, (3, 16, 16), file).full.ms == 3 + 2 * len(paths)
    del own["layers"][paths[0]]  # type: ignore[attr-defined]
    file.write_text(json.dumps(own))
    with pytest.raises(ConfigError, match=rf"no milliseconds of the layer '{paths[0]}'"):
        costs_of({"binary": student}, model, (3, 16, 16), file)
    for text in ('{"rest": -1, "layers": {}}', "[1]", "{", '{"layers": {}}'):
        file.write_text(text)
        with pytest.raises(FormatError, match="is no table of milliseconds"):
            costs_of({"binary": student}, model, (3, 16, 16), file)


def test_a_precision_without_milliseconds_is_no_choice() -> None:
    found = synthetic([[(0.1, 0, 1, 1), (0.0, 0, 2, 2), (0, 100, 3, 3)]] * 2)
    unknown = [
        row.model_copy(update={"costs": {**row.costs, "middle": Cost(macs=0, ops=0, bytes=2)}}) for row in found.rows
    ]
    found = found.model_copy(update={"rows": tuple(unknown)})
    assert set(allocation(found, read_budget(ms=5)).chosen.values()) == {"binary", "float"}
    assert set(allocation(found, read_budget(bytes=0.5, macs=0.1)).chosen.values()) == {"middle"}


def test_methods_without_two_bits_have_no_choice_of_them(tmp_path: Path) -> None:
    """Mixed methods: of ``irnet``'s layers there is no two-bit form, so nothing is measured, shown or chosen."""
    torch.manual_seed(0)
    teacher = build_model("demo:unet", width=8, num_classes=3, levels=2).eval()
    config = bd.BidensifyConfig(rules=(bd.Rule("decoder.*", "irnet"),))
    student = bd.bidensify(teacher, config)
    found = bd.sensitivity(
        student, Colours(4, seed=1), teacher, task=SegmentationTask(3), precisions=["act_bits 2"], quiet=True
    )
    theirs = {path for path, layer in binary_layers(student) if layer.method == "irnet"}
    assert 0 < len(theirs) < len(found.layers)
    for row in found.layers:
        assert found.has(row, "act_bits 2") is (row.name not in theirs)
    assert len([line for line in found.to_markdown().splitlines() if "| – | – |" in line]) == len(theirs)
    found.plot(tmp_path / "gains.svg")
    chosen = allocation(found, read_budget({"ops": 0.6}))
    assert not theirs & {path for path, name in chosen.chosen.items() if name == "act_bits 2"}
    assert bd.bidensify(teacher, chosen.config).bidensify_plan.binary


def test_the_solver_prints_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS does so for some programs, from C++, where the command line prints JSON."""
    scipy_optimize: Any = importlib.import_module("scipy.optimize")
    solve = scipy_optimize.milp

    def loud(*arguments: Any, **options: Any) -> Any:
        c = ctypes.CDLL(None)
        c.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
        return solve(*arguments, **options)

    monkeypatch.setattr(scipy_optimize, "milp", loud)
    assert choose([1.0, 0.0, 3.0, 1.0], [0, 0, 1, 1], [([1.0, 2.0, 1.0, 2.0], 3.0)]) == [0, 3]
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")


def test_a_choice_by_distance_says_that_the_metric_may_fall() -> None:
    """Two layers, of which the dearer one moves the network further and loses less of the metric."""
    found = synthetic(
        [[(0.0, 0, 0, 0), (0.0, 0, 100, 0), (0, 0, 60, 0)], [(0.2, 0, 0, 0), (0.2, 0, 100, 0), (0, 0, 50, 0)]]
    )
    further = {"l0": 1.0, "l1": 0.5}
    rows = [
        row.model_copy(
            update={
                "measured": {k: m.model_copy(update={"distance": further[row.name]}) for k, m in row.measured.items()}
            }
        )
        for row in found.rows
    ]
    found = found.model_copy(update={"rows": tuple(rows)})

    def spent(amount: float, by: str) -> Allocation:
        return allocation(found, read_budget(bytes=(40 + amount) / FULL.bytes, by=by))

    assert [spent(amount, "distance").expected for amount in (50, 60)] == pytest.approx([0.9, 0.7])
    assert [spent(amount, "metric").expected for amount in (50, 60)] == pytest.approx([0.9, 0.9])
    for by, said in (("distance", True), ("metric", False)):
        assert ("may come with a little less miou" in spent(60, by).lines()[-1]) is said
        assert spent(60, by).to_dict()["by"] == by
