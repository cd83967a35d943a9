"""Checks of the paths on a command line that reads and writes weights, made before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from tinygptv_ds.config.paths import local_path
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.other_files import not_there


def require_path(path: Path) -> None:
    """Check that a path to read exists.

    Raises:
        WeightsError: it does not.
    """
    found = local_path(path)
    if not found.exists():
        raise WeightsError(f"{found}: {not_there(found)}")


def refuse_existing(out: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        WeightsError: `out` exists and is not an empty folder.
    """
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise WeightsError(f"{out} already exists; choose another --out, or remove it")
