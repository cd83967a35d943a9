"""Paths as users write them: with `~`, the folder that the Hugging Face cache keeps a model in, files to write."""

from __future__ import annotations

import os
from pathlib import Path

from tinygptv_ds.errors import ConfigError


def expand_user(path: str | Path) -> Path:
    """Return a path with `~` expanded; unlike in Path's own way, `~` of an unknown user is an ordinary name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def check_ending(option: str, file: Path | None, ending: str) -> None:
    """Check the name of a file to write, where one is given.

    Raises:
        ConfigError: it has another ending than that of its format; names the option.
    """
    if file is not None and file.suffix.lower() != ending:
        raise ConfigError(f"{option} {file}: the name must end in {ending}")


def local_path(path: str | Path) -> Path:
    """Return a path with `~` expanded and a model's folder of the Hub cache replaced by its snapshot.

    The cache keeps a model as `models--ORG--NAME` with `blobs`, `refs/main` and `snapshots/HASH`; the snapshot, whose
    files link to the blobs, looks like the repository. A folder without a snapshot, or with several of which none is
    `refs/main`, is returned as it is.
    """
    path = expand_user(path)
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    if not (snapshots.parent.name.startswith("models--") and snapshots.is_dir()):
        return path
    main = snapshots.parent / "refs" / "main"
    named = snapshots / main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else None
    if named is not None and named.is_dir() and named.parent == snapshots:
        return named
    found = [folder for folder in snapshots.iterdir() if folder.is_dir()]
    return found[0] if len(found) == 1 else path
