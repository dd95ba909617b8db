"""Files that are whole or absent: written under a temporary name and renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is flushed to disk and renamed onto ``path``.

    On an exception the temporary file is removed and ``path`` keeps its former content.

    Raises:
        OSError: of a place that cannot be written to; with ENOSPC where the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            yield temporary
        except OSError:
            raise
        except Exception as error:
            # Writers have errors of their own classes for a full disk; not all of them say so.
            full = os.strerror(errno.ENOSPC)
            if full in str(error) or shutil.disk_usage(target.parent).free < 1 << 16:
                raise OSError(errno.ENOSPC, full, str(target)) from error
            raise
        # mkstemp creates 0600; a finished file gets what the user's umask would have given it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """Returns ``folder / name`` after checking that it stays inside ``folder``.

    Raises:
        ValueError: ``name`` is absolute or leads out of the folder.
    """
    root = Path(folder).resolve()
    path = (root / name).resolve()
    if root != path and root not in path.parents:
        raise ValueError(f"the path {name!r} leads out of {str(folder)!r}; use a name inside that folder")
    return path
