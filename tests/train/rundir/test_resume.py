from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bidensify.errors import FormatError


def outcome(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[float]]:
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    state = torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)
    return load_file(run_dir / "model.safetensors"), state, [r["loss"] for r in records if r["kind"] == "step"]


def same(a: Any, b: Any) -> bool:
    """Bit-exact equality of nested data, leaving out measured times and places in files."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        keys = a.keys() - {"images_per_second", "seconds", "log_position"}
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture(scope="module")
def unbroken(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run that nothing interrupts, with dropout so that the generators' states matter."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["TINY_DROPOUT"] = "1"
    tiny.student_run(run_dir)
    yield outcome(run_dir)
    os.environ.pop("TINY_DROPOUT")
    torch.set_num_threads(threads)


def test_sigkill_in_mid_epoch_then_resume_ends_with_the_same_bits(unbroken: Any, tmp_path: Path) -> None:
    run_dir, program = tmp_path / "run", str(Path(__file__).resolve().parents[2] / "tiny.py")
    process = subprocess.Popen([sys.executable, program, str(run_dir), json.dumps({"delay": 0.02})])
    log = run_dir / "log.jsonl"
    deadline = time.monotonic() + 120
    # Step 13 of 20: in the middle of the third epoch, one step after a checkpoint.
    while not (log.exists() and b'"step": 13,' in log.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run_dir / "result.json").exists()
    before = torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)["state"]
    assert before["batch"] > 0
    subprocess.run([sys.executable, program, str(run_dir), json.dumps({"resume": True})], check=True)
    weights, state, losses = outcome(run_dir)
    assert same(weights, unbroken[0])
    assert same(state, unbroken[1])
    assert losses == unbroken[2]
    assert '"kind": "resumed"' in log.read_text()
    # An epoch's time and speed are those of all its steps, not of those after the resume.
    epoch = state["state"]["history"][before["epoch"]]
    assert epoch["seconds"] > before["seconds"] > 0
    assert epoch["images_per_second"] == pytest.approx(40 / epoch["seconds"])


@pytest.mark.parametrize("reads", [24, 41, 65, 100, 137, 170])
def test_interrupted_anywhere(tiny: ModuleType, unbroken: Any, tmp_path: Path, reads: int) -> None:
    """Before the first checkpoint, at an epoch's first batch, in mid-epoch, at a stage's start, near the end."""
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(tmp_path / "run", fail_at=reads)
    tiny.student_run(tmp_path / "run", resume=True)
    weights, state, losses = outcome(tmp_path / "run")
    assert same(weights, unbroken[0])
    assert same(state, unbroken[1])
    assert losses == unbroken[2]


def test_interrupted_twice_and_checkpointed_seldom(tiny: ModuleType, unbroken: Any, tmp_path: Path) -> None:
    changes = {"checkpoint": {"every": 2}}
    for reads in (130, 60):
        with pytest.raises(KeyboardInterrupt):
            tiny.student_run(tmp_path / "run", resume=True, fail_at=reads, changes=changes)
    tiny.student_run(tmp_path / "run", resume=True, changes=changes)
    assert same(outcome(tmp_path / "run")[0], unbroken[0])


def test_truncated_checkpoint_is_a_clear_error(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny.student_run(tmp_path / "run", fail_at=100)
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(FormatError, match=r"last\.pt' cannot be read.*remove it to start the run anew"):
        tiny.student_run(tmp_path / "run", resume=True)
