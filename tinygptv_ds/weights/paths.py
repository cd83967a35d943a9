"""Checks of the paths on a command line that reads and writes weights, made before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from tinygptv_ds.errors import WeightsError


def require_path(path: Path) -> None:
    """Check that a path to read exists.

    Raises:
        WeightsError: it does not.
    """
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder; correct the path")


def refuse_existing(out: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        WeightsError: `out` exists and is not an empty folder.
    """
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise WeightsError(f"{out} already exists; choose another --out, or remove it")
