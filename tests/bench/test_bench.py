"""``bench``: what is timed beside what, which rounds count, and what the tables and the JSON say. No time is asserted."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from bidensify.bench import timing
from bidensify.bench.cases import CASES, Case
from bidensify.bench.int8 import installed_runtimes
from bidensify.bench.memory import peak_memory
from bidensify.bench.result import Row, render
from bidensify.bench.run import run_bench
from bidensify.deploy.backends import available_kernels
from bidensify.errors import ConfigError
from bidensify.models import build_model

KERNEL = available_kernels()[0]
SMALL = Case("3x3 8->8 at 6x6", "conv", (1, 8, 6, 6), 8, 3, 1, 1)


def text_of(result: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=240)
    console.print(render(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_variants_run_in_turn_and_equally_often() -> None:
    calls: list[str] = []
    result = timing.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.001, least=4)
    warm, counted = calls[:4], calls[4:]
    assert warm == ["a", "a", "b", "b"]
    assert counted == ["a", "b"] * result.rounds
    assert result.rounds >= 4
    assert set(result.milliseconds) == {"a", "b"}


def stretches(monkeypatch: pytest.MonkeyPatch, loads: list[float | None]) -> None:
    """Stretch i takes a second, holds one round of i milliseconds and has the i-th load; the last one repeats."""
    made = iter(range(1000))

    def stretch(variants: dict[str, object], seconds: float) -> tuple[dict[str, list[float]], timing._Load]:
        i = next(made)
        return {name: [i * 1e-3] for name in variants}, timing._Load(1.0, loads[min(i, len(loads) - 1)])

    monkeypatch.setattr(timing, "_stretch", stretch)


def test_only_rounds_of_an_idle_machine_count(monkeypatch: pytest.MonkeyPatch) -> None:
    stretches(monkeypatch, [0.9, 0.0, 0.5, 0.02, 0.0])
    result = timing.interleave({"a": lambda: None}, seconds=3, least=1, idle=True, patience=1e6)
    assert result.rounds == 3
    assert result.milliseconds["a"] == pytest.approx(3)  # stretches 1, 3 and 4
    stretches(monkeypatch, [0.9, 0.0, 0.5, 0.02, 0.0])
    assert timing.interleave({"a": lambda: None}, seconds=3, least=1).milliseconds["a"] == pytest.approx(1)


def test_patience_ends_and_the_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stretches(monkeypatch, [1.0])
    result = timing.interleave({"a": lambda: None}, seconds=0.0, least=3, idle=True, patience=0.0)
    assert result.rounds >= 3
    assert result.others is None or result.others == pytest.approx(1.0)


def test_layers_in_every_variant(tmp_path: Path) -> None:
    result = run_bench(cases=[SMALL], kernels=[KERNEL], seconds=0.01, latent=True, threads=[1, 2])
    assert json.loads(json.dumps(result)) == result
    assert [(row["case"], row["threads"]) for row in result["rows"]] == [(SMALL.name, 1), (SMALL.name, 2)]
    assert list(result["rows"][0]["milliseconds"]) == ["float", "latent", KERNEL, f"{KERNEL} bfloat16"]
    text = text_of(result)
    assert SMALL.name in text
    assert len(re.findall(r"\d\.\d\dx", text)) == 6  # ratios of three variants on either number of threads
    assert "Peak" not in text


def test_both_bits_of_activations_stand_beside_float() -> None:
    result = run_bench(cases=[SMALL], kernels=[KERNEL], seconds=0.01, latent=True, bfloat16=False, act_bits=[1, 2])
    wanted = ["float", "latent", KERNEL, "latent 2 bits", f"{KERNEL} 2 bits"]
    assert list(result["rows"][0]["milliseconds"]) == wanted


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float_and_latent_layers_of_a_case_have_one_shape(case: Case) -> None:
    small = replace(case, shape=(*case.shape[:2], 8, 8) if len(case.shape) == 4 else (1, 8, case.shape[2]))
    floats, latent = small.build()
    with torch.no_grad():
        assert floats(small.input()).shape == latent(small.input()).shape


def test_a_ratio_is_of_medians_and_stands_in_the_table() -> None:
    row = Row(
        "net", 2, {"float": 40.0, "avx2": 10.0}, 5, memory={"float": {"peak": 900, "libraries": 700, "faults": 12.4}}
    )
    assert row.ratio("avx2") == 4
    row.memory["packed"] = {"peak": 800, "libraries": 700, "faults": 3.0}
    text = text_of({"machine": {"processor": "P", "torch": "2"}, "rows": [vars(row)]})
    (line,) = [line for line in text.splitlines() if "avx2" in line]
    assert "10.000" in line
    assert "4.00x" in line
    assert "12" in text
    assert "0.50" in text  # 100 MiB above the libraries against 200


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"threads=\[0\]"):
        run_bench(cases=[SMALL], threads=[0])
    with pytest.raises(ConfigError, match="sse9"):
        run_bench(cases=[SMALL], kernels=["sse9"])
    with pytest.raises(ConfigError, match=r"act_bits=\[3\]"):
        run_bench(cases=[SMALL], act_bits=[3])
    with pytest.raises(ConfigError, match=r"act_bits=\[1, 2\]"):
        run_bench(nn.Conv2d(3, 3, 1), act_bits=[1, 2])
    with pytest.raises(ConfigError, match="spec="):
        run_bench(nn.Conv2d(3, 3, 1), memory=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_a_packed_network_in_its_own_process() -> None:
    network = build_model("demo:unet", width=8).eval()
    found = peak_memory(network, "demo:unet", (256, 256), 1, options={"width": 8}, variants=("packed",))
    assert list(found) == ["packed"]
    # The input alone is 0.75 MiB.
    assert found["packed"]["faults"] >= 0
    assert found["packed"]["peak"] > found["packed"]["libraries"] + 0.75 > 10


@pytest.mark.skipif(
    not installed_runtimes(), reason="neither openvino with nncf nor onnxruntime with onnx is installed"
)
def test_int8_stands_beside_the_others(tmp_path: Path) -> None:
    result = run_bench(cases=[SMALL], kernels=[KERNEL], seconds=0.01, int8=True, int8_folder=tmp_path)
    assert set(installed_runtimes()) <= set(result["rows"][0]["milliseconds"])
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*int8*") if file.is_file()}
    assert kept
    run_bench(cases=[SMALL], kernels=[KERNEL], seconds=0.01, int8=True, int8_folder=tmp_path)
    assert kept == {file: file.stat().st_mtime_ns for file in kept}
