from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bidensify._util.fingerprint import fingerprint, weights_fingerprint
from bidensify._util.modules import import_own, is_imported
from bidensify.errors import ConfigError


def test_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours_of_here.py").write_text("VALUE = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert not is_imported("ours_of_here")
    assert import_own("ours_of_here").VALUE == 3
    assert is_imported("ours_of_here")
    sys.modules.pop("ours_of_here")


def test_a_file_runs_once_as_long_as_it_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "types.py"  # a name that Python has too
    file.write_text("VALUE = 1\n")
    first = import_own(str(file))
    assert import_own(str(file)) is first
    assert is_imported(str(file))
    assert sys.modules["types"] is not first
    file.write_text("VALUE = 2\n")
    os.utime(file, (1, 1))
    assert not is_imported(str(file))
    assert import_own(str(file)).VALUE == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module", r"'no_such_module' cannot be imported .*working directory"),
        ("", "cannot be imported"),
        (".relative", "cannot be imported"),
        ("gone.py", "there is no file 'gone.py'"),
    ],
)
def test_what_is_not_there(name: str, message: str) -> None:
    assert not is_imported(name)
    with pytest.raises(ConfigError, match=message):
        import_own(name)


def test_fingerprints() -> None:
    import torch
    from torch import nn

    net, same, other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
    assert fingerprint(net) == fingerprint(same) != fingerprint(other)
    assert weights_fingerprint(net) != weights_fingerprint(same)
    same.load_state_dict(net.state_dict())
    assert weights_fingerprint(net) == weights_fingerprint(same)
    with torch.no_grad():
        same.weight[0, 0, 0, 0] += 1e-4
    assert weights_fingerprint(net) != weights_fingerprint(same)
    assert weights_fingerprint(net.bfloat16()) != weights_fingerprint(nn.Conv2d(3, 4, 1))
