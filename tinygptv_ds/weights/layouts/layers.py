"""The layers that the names of a file's tensors count."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import listing

MOST_LAYERS = 500  # that a module is built of; the published models have 32 and 40, and 400 take a second
_LONGEST = 5  # digits of a layer's number


def layer_numbers(names: Collection[str], pattern: str, path: Path) -> set[int]:
    """Return the numbers that the first group of `pattern` finds at the beginning of names; modules are built by them.

    Args:
        names: of all tensors.
        pattern: a regular expression.
        path: the file, for errors.

    Raises:
        WeightsError: a number is far larger than any layer's.
    """
    found = {name: match[1] for name in names if (match := re.match(pattern, name))}
    senseless = [
        name for name, text in found.items() if len(text) > _LONGEST or int(text) >= min(len(names), MOST_LAYERS)
    ]
    if senseless:
        raise WeightsError(
            f"{path}: {listing(senseless)} among {len(names):,} tensors: no model of this kind has so many layers (at "
            f"most {MOST_LAYERS}); the file is damaged, or another one than you meant"
        )
    return {int(text) for text in found.values()}
