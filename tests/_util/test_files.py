"""Files are whole or absent; paths stay inside their folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bidensify._util.files import atomic_write, inside


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError, match="stop"), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_paths_that_lead_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        inside(tmp_path, name)


def test_paths_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.png") == (tmp_path / "a" / "b.png").resolve()


@pytest.mark.parametrize(("free", "text"), [(0, "of the writer"), (1 << 30, "I/O error: No space left on device")])
def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, text: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "file"):
        raise ValueError(text)
    assert isinstance(caught.value.__cause__, ValueError)
    assert list(tmp_path.iterdir()) == []
