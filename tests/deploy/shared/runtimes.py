"""The runtimes without torch that are installed, and what their files give."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from torch import Tensor, nn

from bidensify.deploy.runtimes.again import run_again


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips where one of these is not installed. Packages are asked for, not imported: counting tests loads no runtime."""
    installed = {found.metadata["Name"] for found in importlib.metadata.distributions()}
    missing = [package for package in packages if package not in installed]
    extra = "executorch" if "executorch" in packages else "openvino"
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install 'bidensify[{extra}]'")


RUNTIMES = [
    pytest.param(".pte", marks=needs("executorch")),
    pytest.param(".xml", marks=needs("openvino")),
]


class Beside(nn.Module):
    """Networks, each with an input of its own."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for net, x in zip(self.nets, inputs) for y in net(x))


def outputs(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    """What the file gives, in a process of its own."""
    from bidensify.deploy.executorch import program as pte
    from bidensify.deploy.openvino import program as ir
    from bidensify.deploy.runtimes.build import EXECUTORCH, OPENVINO

    runtime, program = (EXECUTORCH, pte) if path.suffix == ".pte" else (OPENVINO, ir)
    found = run_again(runtime, program.__file__, path, path.name, [inputs])
    assert not isinstance(found, str), found
    return found[0]
