"""Near names for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["near"]


def near(name: object, known: Iterable[str]) -> str:
    """Ends an error about an unknown name: ``"; did you mean 'a' or 'b'?"``, else ``"; known: ..."`` and the first names.

    Args:
        name: what was given.
        known: what could have been; its order is that of the list.
    """
    names = list(known)
    lower = {key.lower(): key for key in reversed(names)}
    close = difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(repr(lower[key]) for key in close)}?"
    if not names:
        return "; there are none"
    more = f", ... ({len(names)} in all)" if len(names) > 20 else ""
    return f"; known: {', '.join(names[:20])}{more}"
