"""Random edits of a whole .pte (bytes, runs, cuts): loaded and run in child processes of the runner.

    python fuzz_pte.py LIBRARY NET.pte 10000             # as files are damaged: every one must be refused, and nothing crash
    python fuzz_pte.py LIBRARY NET.pte 1000 --sealed     # with the seal made anew: what ExecuTorch's own loader does then

A child takes files until it crashes; then another goes on. Needs neither torch nor bidensify.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[3] / "bidensify" / "deploy" / "executorch" / "program.py"
SEAL = 48


def edited(data: bytes, seed: int) -> bytes:
    """One to eight bytes, a run of them, or a cut."""
    draw = random.Random(seed)
    made = bytearray(data)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(made[: draw.randrange(len(made))])
    if kind == 1:
        start = draw.randrange(len(made))
        length = min(draw.randrange(1, 256), len(made) - start)
        made[start : start + length] = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)])
    else:
        # Half of them in what describes the program; its tables are in the first bytes.
        reach = len(made) if kind == 2 else min(len(made), 20_000)
        for _ in range(draw.randrange(1, 9)):
            at = draw.randrange(reach)
            made[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, made[at] ^ 1 << draw.randrange(8), draw.randrange(256)])
    # An edit may have written what was there.
    return bytes(made) if bytes(made) != data else bytes(made[:-1])


def child(library: str, path: str, first: int, last: int, sealed: bool) -> None:
    """Says before each file which it is, and after it what became of it."""
    import numpy as np

    spec = importlib.util.spec_from_file_location("program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = Path(path).read_bytes()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "net.pte"
        for seed in range(first, last):
            body = edited(data[:-SEAL] if sealed else data, seed)
            file.write_bytes(body + b"bidensify sha256" + hashlib.sha256(body).digest() if sealed else body)
            print(f"open {seed}", flush=True)
            try:
                net = module.Program(file, library)
                print(f"run {seed}", flush=True)
                net(*(np.zeros(shape, dtype) for shape, dtype in net.inputs))
            except (RuntimeError, ValueError):
                print(f"refused {seed}", flush=True)
            else:
                print(f"ran {seed}", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("path")
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sealed", action="store_true")
    given = parser.parse_args()
    if given.child:
        child(given.library, given.path, given.first, given.count, given.sealed)
        return
    ends: Counter[str] = Counter()
    done = 0
    while done < given.count:
        command = [
            sys.executable,
            __file__,
            given.library,
            given.path,
            str(given.count),
            "--first",
            str(done),
            "--child",
        ]
        command += ["--sealed"] if given.sealed else []
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=600)
            lines, code = run.stdout.split("\n"), run.returncode
        except subprocess.TimeoutExpired as error:
            lines, code = (error.stdout or b"").decode(errors="replace").split("\n"), 1
        words = [line.split() for line in lines if line.startswith(("open ", "run ", "refused ", "ran "))]
        ends.update(word for word, _ in words if word in ("refused", "ran"))
        if code == 0:
            break
        if not words:
            raise SystemExit(f"the child did not start: {run.stderr[-500:]}")
        # The file at work when it ended.
        ends[f"crash in {words[-1][0]}"] += 1
        done = int(words[-1][1]) + 1
    crashes = ends["crash in open"] + ends["crash in run"]
    print(f"{given.count} edits, {ends['refused']} refused, {ends['ran']} ran, {crashes} crashes {dict(ends)}")
    raise SystemExit(0 if given.sealed or ends["refused"] == given.count else 1)


if __name__ == "__main__":
    main()
