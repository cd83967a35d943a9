"""The checkpoints of a run by the names of their folders; imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "checkpoints"


def complete_ones(checkpoints: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first, without those whose writing was interrupted."""
    return sorted(path for path in checkpoints.glob("step-*") if is_complete(path) and path.is_dir())


def is_complete(path: Path) -> bool:
    """Return whether a path has the name of a complete checkpoint."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint is named after."""
    return int(folder.name.removeprefix("step-"))


def newest_step(run_dir: Path) -> int:
    """Return the step of a run's newest checkpoint; -1: there is none."""
    found = complete_ones(run_dir / FOLDER)
    return step_of(found[-1]) if found else -1
