"""Suggestions for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 100  # characters of a name; comparing longer ones takes time and finds nothing


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message about an unknown `name`: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name[:_LONGEST], known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"
