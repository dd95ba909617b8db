"""Rewrites every network of the zoo and checks each against its original: ``docs/models.md``.

    python benchmarks/models.py                          # the whole list, each network in a process of its own
    python benchmarks/models.py --resume                 # only networks without a result yet
    python benchmarks/models.py --only 'timm:*'          # only these; others keep their results
    python benchmarks/models.py --render                 # the page again from the results, nothing run
    python benchmarks/models.py --export --resume        # the column .pte for networks that have a row; needs ExecuTorch

Results are one line of JSON per network, sorted by the list, in ``benchmarks/results/models.jsonl``.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

RESULTS = HERE / "results" / "models.jsonl"
PAGE = HERE.parent / "docs" / "models.md"
MARK = "result: "


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """One writer at a time, so that several sweeps can share a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> row."""
    if not file.is_file():
        return {}
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row["name"]: row for row in rows}


def add(file: Path, row: dict[str, Any], order: list[str]) -> None:
    """Puts one row into the file, which stays whole and in the list's order; rows of networks that left the list go."""
    from bidensify._util.files import atomic_write

    with locked(file):
        rows = read(file)
        rows[row["name"]] = row
        text = "".join(json.dumps(rows[name], sort_keys=True) + "\n" for name in order if name in rows)
        with atomic_write(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def machine() -> dict[str, str]:
    """What the row was made on."""
    import torch

    from bidensify._util.machine import cpu_name

    return {"cpu": cpu_name(), "torch": torch.__version__}


def run_one(name: str, seconds: float, export: bool = False) -> dict[str, Any]:
    """Examines one network in a process of its own; a crash or a run over the limit is a row too."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", name, *(["--export"] if export else [])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    stage = "imports"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            stage = next((line[7:] for line in reversed(output.splitlines()) if line.startswith("stage: ")), stage)
            return {"name": name, "convert": f"not done after {seconds:.0f} s, at: {stage}", "seconds": 0.0}
    for line in output.splitlines():
        if line.startswith(MARK):
            row: dict[str, Any] = json.loads(line[len(MARK) :])
            return row
    tail = " ".join(output.split())[-300:]
    return {"name": name, "convert": f"the process ended with code {process.returncode}: {tail}", "seconds": 0.0}


def row_of(name: str, export: bool) -> None:
    """The subprocess's part: prints the row."""
    import torch
    from zoo.checks import CHECKS, examine
    from zoo.deployed import DEPLOYED
    from zoo.networks import networks

    torch.set_num_threads(1)
    checks = DEPLOYED if export else CHECKS
    row = examine(networks()[name], lambda text: print(f"stage: {text}", flush=True), checks)
    print(MARK + json.dumps({**row, "machine": machine()}, sort_keys=True), flush=True)


def _need_executorch() -> None:
    from bidensify.deploy.runtimes.build import EXECUTORCH
    from bidensify.errors import MissingExtraError

    try:
        EXECUTORCH.find()
    except MissingExtraError as error:
        raise typer.BadParameter(f"--export: {error}") from None


def main(
    only: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Networks to run; repeat for more.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out networks that have a result.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Leave out networks whose result has no failure.")] = False,
    render: Annotated[bool, typer.Option("--render", help="Write the page from the results and run nothing.")] = False,
    results: Annotated[Path, typer.Option(help="The file of results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
    limit: Annotated[float, typer.Option(metavar="SECONDS", help="Time for one network.")] = 900.0,
    names: Annotated[bool, typer.Option("--names", help="Print the names that would run and run nothing.")] = False,
    export: Annotated[
        bool, typer.Option("--export", help="Check the .pte alone, and add it to the rows that are there.")
    ] = False,
    row: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Rewrite and check the networks of the zoo; exit code 1 if a check failed."""
    if row is not None:
        row_of(row, export)
        return
    from zoo.networks import networks
    from zoo.page import failures, write_page

    order = list(networks())
    chosen = [name for name in order if not only or any(fnmatch.fnmatchcase(name, glob) for glob in only)]
    if not chosen:
        raise typer.BadParameter(f"--only {' '.join(only or ())} matches none of the {len(order)} networks (--names)")
    found = read(results)
    if export:
        _need_executorch()
        # Networks that convert; what is known of them stays.
        chosen = [name for name in chosen if "checks" in found.get(name, {})]
    if resume:
        chosen = [name for name in chosen if name not in found or (export and "pte" not in found[name]["checks"])]
    if failed:
        chosen = [name for name in chosen if name not in found or failures(found[name])]
    if names:
        print("\n".join(chosen))
        return
    bad = 0
    for number, name in enumerate(() if render else chosen, 1):
        start = time.monotonic()
        result = run_one(name, limit, export)
        if export:
            pte = result.get("checks", {}).get("pte") or {"status": result.get("refused") or result["convert"]}
            result = {**found[name], "checks": {**found[name]["checks"], "pte": pte}}
        add(results, result, order)
        wrong = ([] if pte["status"] == "pass" else [f"pte: {pte['status']}"]) if export else failures(result)
        bad += bool(wrong)
        text = f"refused: {result['refused']}" if "refused" in result else "; ".join(wrong) or "passes"
        print(f"[{number}/{len(chosen)}] {name} ({time.monotonic() - start:.0f} s): {text}", flush=True)
    write_page(page, read(results), order)
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
