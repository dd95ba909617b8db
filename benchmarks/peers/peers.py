"""Other projects' own tests on converted networks: python benchmarks/peers/peers.py --cache FOLDER [PROJECT ...]

Source distributions of the installed segmentation_models.pytorch, timm and transformers come from PyPI into ``--cache``
(outside git), with the two small packages that their tests import. Each selected test then runs twice, as it is and with
every network that it makes rewritten by ``bidensify`` (``plugin.py``); ``benchmarks/results/peers.json`` tells which of
those that pass before still pass, and which newly fail with which reason (``known.yaml``).

What the distributions lack: segmentation_models.pytorch 0.6.0 has no tests/models in its own, so the newest that has tests
of networks (0.3.4: tests/test_models.py) runs against the installed release; transformers 5.24.0 has ``ModelTesterMixin``
but no tester of a family, so ``families.py`` holds testers of ours for it.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "peers.json"
NEEDED = ("parameterized", "mock")
TIMM = ("test_model_forward", "test_model_backward", "test_model_forward_features")
TIMM += ("test_model_forward_intermediates", "test_model_forward_intermediates_features")
TIMM += ("test_model_forward_fx", "test_model_backward_fx")


@dataclass(frozen=True)
class Project:
    """One project: its distribution, the release whose tests run, the file with the tests (of theirs, or of ours)."""

    package: str
    tests_of: str
    file: str


PROJECTS = {
    "smp": Project("segmentation_models_pytorch", "0.3.4", "tests/test_models.py"),
    "timm": Project("timm", version("timm"), "tests/test_models.py"),
    "transformers": Project("transformers", version("transformers"), "tests/test_dense_families.py"),
}


def _download(cache: Path, project: Project) -> Path:
    """The unpacked source distribution."""
    folder = cache / f"{project.package}-{project.tests_of}"
    if not folder.exists():
        what = f"{project.package}=={project.tests_of}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-binary", ":all:", "--no-deps", "-d", str(cache)]
        subprocess.run([*command, what], check=True)
        with tarfile.open(cache / f"{folder.name}.tar.gz") as archive:
            tests = [
                member for member in archive if member.name.split("/")[1:2] == ["tests"]
            ]  # the package is installed
            archive.extractall(cache, tests, filter="data")
    return folder


def _needed(cache: Path) -> Path:
    folder = cache / "needed"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *NEEDED], check=True)
    return folder


def _lay_out(folder: Path, project: Project) -> None:
    """Our testers beside transformers' mixin, and empty classes for the two mixins that the distribution lacks."""
    if project.package != "transformers":
        return
    tests = folder / "tests"
    for package, module, name in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        (tests / package).mkdir(exist_ok=True)
        (tests / package / "__init__.py").touch()
        (tests / package / f"{module}.py").write_text(f"class {name}:\n    pass\n")
    (tests / "__init__.py").touch()
    (tests / "test_dense_families.py").write_text((HERE / "families.py").read_text())


def _run(cache: Path, name: str, rewritten: bool, only: list[str] | None, match: str = "") -> dict[str, dict[str, Any]]:
    """Outcome and last line of the error of every selected test."""
    project = PROJECTS[name]
    folder = _download(cache, project)
    _lay_out(folder, project)
    log = cache / f"{name}_{'after' if rewritten else 'before'}.jsonl"
    if only is None:
        log.unlink(missing_ok=True)
    earlier = log.read_text().splitlines() if log.exists() else []
    if only != []:
        paths = [str(HERE), str(_needed(cache)), os.environ.get("PYTHONPATH", str(HERE.parents[1]))]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "BIDENSIFY_PEERS": json.dumps({"project": name, "rewritten": rewritten, "log": str(log), "only": only}),
            "HF_HUB_OFFLINE": "1",
            "TIMEOUT": "100000",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "plugin",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            "-W",
            "ignore",
        ]
        command += ["-k", match] if match else []
        subprocess.run([*command, project.file], cwd=folder, env=environment, check=False, stdout=subprocess.DEVNULL)
    return _merged(earlier) | _merged(log.read_text().splitlines()[len(earlier) :])


def _merged(lines: list[str]) -> dict[str, dict[str, Any]]:
    """One row a test: a test with subtests has a line for each, and has failed where one has."""
    worst = ("passed", "skipped", "failed")
    merged: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, lines):
        known = merged.setdefault(row["test"], row)
        if worst.index(row["outcome"]) > worst.index(known["outcome"]):
            merged[row["test"]] = row
    return merged


def _reason(known: list[dict[str, str]], project: str, test: str, error: str) -> str | None:
    for entry in known:
        if (
            entry.get("project", project) == project
            and fnmatch.fnmatch(test, entry.get("test", "*"))
            and entry.get("error", "") in error
        ):
            return entry["reason"]
    return None


def compared(name: str, before: dict[str, Any], after: dict[str, Any], known: list[dict[str, str]]) -> dict[str, Any]:
    """What ``peers.json`` says of one project: of the tests that pass before, how many still pass, and why others do not."""
    passing = [test for test, row in before.items() if row["outcome"] == "passed" and test in after]
    lost = [test for test in passing if after[test]["outcome"] != "passed"]
    failing = [
        {"test": t, "error": after[t]["error"], "reason": _reason(known, name, t, after[t]["error"])} for t in lost
    ]
    return {
        "installed": version(PROJECTS[name].package),
        "tests of": PROJECTS[name].tests_of,
        "selected": len(before),
        "pass before": len(passing),
        "still pass": len(passing) - len(lost),
        "newly failing with a known reason": sum(row["reason"] is not None for row in failing),
        "networks that stay as they are (nothing to rewrite)": sum(bool(after[t].get("untouched")) for t in passing),
        "newly failing": failing,
    }


def main(
    projects: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(PROJECTS)}; all")] = None,
    cache: Annotated[Path, typer.Option(help="folder outside git for sources and logs")] = Path(
        "~/.cache/bidensify-peers"
    ),
    again: Annotated[
        str, typer.Option(help="what to run: both | after | failing (what failed on converted networks) | none")
    ] = "both",
    match: Annotated[str, typer.Option(help="run a part alone, as pytest -k")] = "",
) -> None:
    """Runs the tests twice, and writes and prints the table."""
    cache = cache.expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    known = yaml.safe_load((HERE / "known.yaml").read_text())
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in projects or list(PROJECTS):
        if name not in PROJECTS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(PROJECTS)}")
        before = _run(cache, name, False, None if again == "both" else [], match)
        passing = [test for test, row in before.items() if row["outcome"] == "passed"]
        if again == "failing":
            last = _run(cache, name, True, [])
            passing = [test for test in passing if last.get(test, {}).get("outcome") != "passed"]
        after = _run(cache, name, True, [] if again == "none" else passing, match)
        results[name] = compared(name, before, after, known)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    table = Table("project", "pass before", "still pass", "known reason", "unexplained")
    for name, row in results.items():
        unknown = len(row["newly failing"]) - row["newly failing with a known reason"]
        table.add_row(
            name,
            str(row["pass before"]),
            str(row["still pass"]),
            str(row["newly failing with a known reason"]),
            str(unknown),
        )
    console = Console()
    console.print(table)
    for name, row in results.items():
        for reason, count in Counter(
            item["reason"] or item["error"][:100] for item in row["newly failing"]
        ).most_common():
            console.print(f"{name}: {count} × {reason}", markup=False)


if __name__ == "__main__":
    typer.run(main)
