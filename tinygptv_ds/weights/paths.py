"""The paths of a command line that reads weights and writes others, checked before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from tinygptv_ds.errors import WeightsError


def require(path: Path) -> None:
    """See that there is anything to read.

    Raises:
        WeightsError: there is not.
    """
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder; correct the path")


def refuse_existing(out: Path) -> None:
    """See that nothing is overwritten.

    Raises:
        WeightsError: `out` is there and no empty folder.
    """
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise WeightsError(f"{out} is already there; choose another --out, or remove it")
