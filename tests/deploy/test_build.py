"""Runtimes are built whole, however many processes build into one folder."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from bidensify.deploy.runtimes import build
from bidensify.deploy.runtimes.build import EXECUTORCH, Runtime

CONTENT = bytes(range(256)) * 40_000


def test_builds_into_one_folder_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(command: list[str]) -> None:
        if "--install" in command:
            folder = Path(command[-1])
            folder.mkdir(parents=True)
            (folder / EXECUTORCH.library).write_bytes(CONTENT)

    monkeypatch.setattr(build, "_say", say)
    monkeypatch.setattr(Runtime, "folder", lambda self: tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name)
    # Threads that ask for it meet, unlike processes.
    umask = os.umask(0o22)
    os.umask(umask)
    monkeypatch.setattr(os, "umask", lambda mask: umask)
    for trial in range(10):
        out, faults = tmp_path / str(trial), list[str]()

        def one(wait: float, out: Path, faults: list[str]) -> None:
            time.sleep(wait)
            try:
                if EXECUTORCH.build(out).read_bytes() != CONTENT:
                    faults.append("another content")
            except OSError as error:
                faults.append(repr(error))

        threads = [threading.Thread(target=one, args=(0.002 * i, out, faults)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        assert sorted(file.name for file in out.iterdir()) == ["bidensify_program.py", EXECUTORCH.library]
        assert "class Program" in (out / "bidensify_program.py").read_text()
