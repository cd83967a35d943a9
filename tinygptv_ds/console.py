"""What commands print on a terminal. Nothing but the standard library."""

from __future__ import annotations

import contextlib
import sys


def print_to_stderr(message: str) -> None:
    """Print to stderr if anything still reads it; an exit code must not depend on that."""
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr, flush=True)
