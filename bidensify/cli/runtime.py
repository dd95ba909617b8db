"""``runtime build``: the C++ library that runs .pte files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bidensify._util.terminal import console
from bidensify.cli.command import command
from bidensify.cli.options import Debug

__all__ = ["runtime"]


@command(
    "bidensify runtime build --out runtime",
    "bidensify runtime build --out arm --cmake -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake --cmake -DCMAKE_PREFIX_PATH=executorch-arm",
)
def runtime(
    action: Annotated[
        Literal["build", "sources"], typer.Argument(help="build: compile it. sources: print where its C++ lies.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder to build into.", show_default="a cache that export uses")
    ] = None,
    cmake: Annotated[
        list[str] | None, typer.Option(metavar="ARGUMENT", help="An argument for cmake; repeat for more.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Build the C++ runtime of exported networks (*.pte) against the ExecuTorch that is installed.

    Beside the library comes bidensify_program.py, which runs a .pte from Python with NumPy alone.
    """
    from bidensify.deploy.executorch.build import SOURCES, build_runtime, find_runtime

    if action == "sources":
        print(SOURCES)
        return
    library = find_runtime() if out is None and not cmake else build_runtime(out or Path("runtime"), tuple(cmake or ()))
    console().print(f"{library}: {library.stat().st_size:,} bytes", soft_wrap=True)
