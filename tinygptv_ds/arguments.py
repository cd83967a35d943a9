"""How options are spelled on every command line of the project."""

from __future__ import annotations

from collections.abc import Sequence


def hyphenated(argv: Sequence[str]) -> list[str]:
    """Return a command line with hyphens for the underscores in the names of its options; values stay as they are.

    DeepSpeed's options have underscores (`--deepspeed_config`), ours hyphens; either spelling is accepted.
    """
    spelled = []
    for word in argv:
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return spelled
