"""``Sensitivity``: what an analysis found, with its JSON file, its table and its plot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from bidensify._util.files import atomic_write
from bidensify._util.terminal import as_text
from bidensify.errors import ConfigError, FormatError
from bidensify.precisions import show
from bidensify.precisions.findings import Findings

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Sensitivity"]


class Sensitivity(Findings):
    """What :func:`bidensify.sensitivity` measured; ``print`` shows it as a table."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Reads what ``save`` wrote.

        Raises:
            ConfigError: there is no such file.
            FormatError: it is cut short, edited, or of another version.
        """
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"there is no file {str(file)!r}; make it with `bidensify sensitivity`")
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise FormatError(f"{str(file)!r} is no sensitivity of this release: {where}: {first['msg']}") from error

    def table(self, cost: str = "ops", *, groups: bool = False) -> Table:
        """A rich table sorted by gain per cost; see :func:`bidensify.precisions.show.table`."""
        return show.table(self, cost, groups=groups)

    def to_markdown(self, cost: str = "ops", *, groups: bool = False) -> str:
        """The table as Markdown."""
        return show.to_markdown(self, cost, groups=groups)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the gains over depth into ``path`` (.png, .svg or .pdf)."""
        show.plot(self, Path(path))

    def __str__(self) -> str:
        return as_text(self.table())
