"""The files next to the package: stage scripts, recipes, DeepSpeed JSONs, launch scripts, requirements.

In a clone they are in the repository's root; a wheel holds the same folders inside the package.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = _PACKAGE / "_project"


def project_root() -> Path:
    """Return the folder that holds `stages/`, `ds_configs/`, `launch/`, `eval/` and the requirements files."""
    return _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent


def is_clone() -> bool:
    """Return whether the package runs from a clone of the repository rather than from an installed wheel."""
    return project_root() == _PACKAGE.parent


def find_project_file(path: Path) -> Path:
    """Return `path`, or the project's own file of that name if the working directory has none.

    `stages/stage2.yaml` and `ds_configs/zero3_bf16.json` can thus be named from any directory, and without a clone.
    A path that exists, an absolute one, and one that neither place has are returned as they are.
    """
    # os.path.exists, unlike Path's, is False where a path is too long or a folder may not be entered.
    if path.is_absolute() or os.path.exists(path):  # noqa: PTH110
        return path
    ours = project_root() / path
    return ours if os.path.exists(ours) and ours.is_relative_to(project_root()) else path  # noqa: PTH110
