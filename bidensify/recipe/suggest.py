"""Near names for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def suggest(name: str, known: Sequence[str]) -> str:
    """Returns "did you mean ...?" with the names near ``name``, else the list of the known names."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(key) for key in near)}?"
    if not known:
        return "there are no names here"
    shown = sorted(known)[:20]
    return f"known: {', '.join(shown)}" + (", ..." if len(known) > len(shown) else "")
