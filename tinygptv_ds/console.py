"""What commands print on a terminal, and in which colors. Nothing but the standard library."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import TextIO

BOLD, RED, GREEN, YELLOW, MAGENTA, CYAN = "1", "31", "32", "33", "35", "36"  # codes of ECMA-48


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tab and line feed; a file's name may hold any of them


def is_terminal(stream: TextIO) -> bool:
    """Return whether a person watches a stream."""
    return not stream.closed and stream.isatty()


def open_missing_streams() -> None:
    """Open what a caller has closed of stdin, stdout and stderr on the null device.

    Python has None for them, and the next file that is opened would get their numbers and whatever is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def has_colors(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that shows colors, and NO_COLOR is not set (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def colored(text: str, color: str) -> str:
    """Return a text in a color, for a stream that shows colors."""
    return f"\033[{color}m{text}\033[0m" if text else text


def print_to_stderr(message: str) -> None:
    """Print to stderr if it can be written; an exit code must not depend on that."""
    with contextlib.suppress(OSError):
        print(error_text(_CONTROL.sub(_escaped, message)), file=sys.stderr, flush=True)


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{ord(found[0]):02x}"


def error_text(message: str) -> str:
    """Return a message for stderr, with its "error:" in red where that shows colors."""
    start, error, rest = message.partition("error:")
    return colored(error, RED) + rest if error and not start and has_colors(sys.stderr) else message
