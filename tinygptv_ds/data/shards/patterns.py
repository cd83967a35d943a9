"""Which tars a shard pattern names: braces, wildcards, folders, lists, URLs and commands."""

import glob
import os
from pathlib import Path

from braceexpand import braceexpand

from tinygptv_ds.config.paths import expand_user
from tinygptv_ds.data.shards.remote import PIPE, RemoteShard, Shard, list_shards
from tinygptv_ds.errors import DataError


def expand_shards(pattern: str | list[str], root: Path | None = None, *, allow_pipe: bool = False) -> list[Shard]:
    """Return the tars that `pattern` names.

    A pattern is a path with braces (``{00000..01255}.tar``) or wildcards, a folder (its ``*.tar``), either also after
    ``file://``, a URL (``https://``, ``s3://``, or any other that fsspec knows; one that ends in ``/`` is a folder),
    or, with `allow_pipe`, ``pipe:COMMAND``: a tar is the output of the shell command, in which braces expand, too.
    Whether remote shards named by braces exist is not checked here. The order is that of the braces and the list,
    sorted within wildcards and folders.

    Args:
        pattern: one pattern or several.
        root: folder that relative patterns start from.
        allow_pipe: whether commands may be run.

    Raises:
        DataError: a named file does not exist, a wildcard or folder gives none, a file is named twice, or a command is
            given where none is allowed.
    """
    found: list[Shard] = []
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        found += _expand(entry, root, allow_pipe)
    twice = next((path for path in found if found.count(path) > 1), None) if len(set(found)) < len(found) else None
    if twice:
        raise DataError(f"shards: {twice} is listed more than once; list every shard once")
    return found


def _expand(pattern: str, root: Path | None, allow_pipe: bool) -> list[Shard]:
    pattern = pattern.removeprefix("file://")  # the rest is a path, as fsspec reads it, and needs no copy in the cache
    try:
        names = list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"shards: unbalanced braces in {pattern!r}") from None
    if "://" in pattern or any(name.startswith(PIPE) for name in names):
        return [shard for name in names for shard in _remote(name, allow_pipe)]
    return list(_local(pattern, names, root or Path()))


def _remote(url: str, allow_pipe: bool) -> list[RemoteShard]:
    if url.startswith(PIPE) and not allow_pipe:
        raise DataError(f"shards: {url!r} would run a shell command, which only a recipe may allow, by data.allow_pipe")
    listed = not url.startswith(PIPE) and (url.endswith("/") or "*" in url)
    return list_shards(url) if listed else [RemoteShard(url)]


def _local(pattern: str, names: list[str], root: Path) -> list[Path]:
    found, missing = [], []
    for name in names:
        path = root / expand_user(name)
        # These are False, where Path's own raise, for names that are too long.
        if os.path.isdir(path):  # noqa: PTH112
            tars = sorted(path.glob("*.tar"))
        elif os.path.isfile(path):  # noqa: PTH113
            tars = [path]
        elif glob.has_magic(name):
            tars = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 (the pattern may be absolute)
        else:
            tars = []
        found += tars
        if not tars:
            missing.append(path)
    if missing:
        is_folder = os.path.isdir(missing[0])  # noqa: PTH112
        what = f"holds no *.tar: {missing[0]}" if is_folder else f"not found: {missing[0]}"
        count = f" (and {len(missing) - 1} more of {len(names)} named)" if len(missing) > 1 else ""
        raise DataError(f"shards {pattern!r}: {what}{count}; check the path, or narrow the pattern to existing files")
    return found
