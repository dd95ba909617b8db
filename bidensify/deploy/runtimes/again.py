"""A written file, run in a process of its own without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bidensify.deploy.runtimes.build import Runtime
from bidensify.errors import CheckError, ConfigError, MissingExtraError

__all__ = ["run_again", "run_program", "save_arrays"]


def run_again(
    runtime: Runtime, program: str, path: Path, name: str, runs: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]] | str:
    """Outputs of the file in a process without torch; or why it was not run.

    Args:
        runtime: what runs it.
        program: the Python file of that process: ``program LIBRARY FILE INPUTS.npz OUTPUTS.npz PACKAGES``, arrays named run_input
            and run_output; PACKAGES is the folder that the runtime's package was installed into.
        path: the file, under its temporary name.
        name: what it will be called.
        runs: input tensors of each run.

    Raises:
        CheckError: the runtime refuses or does not survive it.
    """
    try:
        library, packages = runtime.find(), runtime.folder().parent
    except (MissingExtraError, ConfigError) as error:
        return str(error)
    with tempfile.TemporaryDirectory() as place:
        given, results = Path(place) / "given.npz", Path(place) / "results.npz"
        save_arrays(given, runs)
        ended = run_program(program, library, path, given, results, packages)
        if ended:
            raise CheckError(f"{name} does not run ({ended}")
        with np.load(results, allow_pickle=False) as file:
            count = {run: sum(name.startswith(f"{run}_") for name in file.files) for run in range(len(runs))}
            return [[torch.from_numpy(file[f"{run}_{i}"]) for i in range(count[run])] for run in count]


def save_arrays(path: Path, runs: Sequence[Sequence[Tensor]]) -> None:
    """Input i of run n as the array n_i of an .npz."""
    arrays = {
        f"{run}_{i}": (value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy()
        for run, values in enumerate(runs)
        for i, value in enumerate(values)
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]


# Alone, but with the packages of this process, wherever they are (a user's own folder, PYTHONPATH).
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); sys.argv[:] = sys.argv[2:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
# What ExecuTorch says of the processor at each start is no reason.
_INFORMED = re.compile(r"I [\d:.]+ executorch:")


def run_program(program: str, *arguments: Path) -> str:
    """Runs a Python file by itself; returns "" or how it ended and the end of what it said."""
    packages = json.dumps([place for place in sys.path if place])
    command = [sys.executable, "-I", "-c", _START, packages, program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if not _INFORMED.match(line))
    return f"exit {done.returncode}): {said[-1500:]}" if done.returncode else ""
