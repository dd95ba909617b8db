"""What the site does to pages: a link that leads out of docs/ (to a recipe, an example) becomes the path's name."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page's text."""
    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", r"\1", markdown)
