"""The process in which an exported file runs again: alone, with the packages of the process that exported it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bidensify.deploy.runtimes.again import run_again, run_program
from bidensify.errors import CheckError


def test_a_program_has_the_packages_of_its_parent_and_its_own_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, place = tmp_path / "packages", tmp_path / "place"
    for folder in (packages, place):
        folder.mkdir()
    (packages / "only_of_a_user.py").write_text("value = 7\n")
    # Neither its own folder nor the working directory is where a program's packages come from.
    (place / "beside.py").write_text("")
    program = place / "program.py"
    program.write_text(
        "import importlib.util, pathlib, sys\n"
        "import only_of_a_user\n"
        "assert importlib.util.find_spec('beside') is None\n"
        "assert 'torch' not in sys.modules and __name__ == '__main__'\n"
        "pathlib.Path(sys.argv[1]).write_text(str(only_of_a_user.value))\n"
    )
    monkeypatch.chdir(place)
    assert "No module named 'only_of_a_user'" in run_program(str(program), tmp_path / "out.txt")
    monkeypatch.syspath_prepend(packages)
    assert run_program(str(program), tmp_path / "out.txt") == ""
    assert (tmp_path / "out.txt").read_text() == "7"
    program.write_text(
        "print('I 00:00:00.000719 executorch:cpuinfo_utils.cpp:71] Reading'); print('E why'); raise SystemExit(3)"
    )
    assert run_program(str(program)) == "exit 3): E why"


def test_what_does_not_run_is_named_as_it_will_be_called(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("print('no magic'); raise SystemExit(1)")
    runtime = cast(Any, SimpleNamespace(find=lambda: tmp_path / "lib.so", folder=lambda: tmp_path / "package"))
    with pytest.raises(CheckError, match=r"^net\.pte does not run \(exit 1\): no magic"):
        run_again(runtime, str(program), tmp_path / ".net.pte.x1.tmp", "net.pte", [[torch.zeros(2)]])
