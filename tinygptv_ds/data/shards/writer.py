"""WebDataset tars: which ones a pattern names, and writing them."""

import contextlib
import glob
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import braceexpand

from tinygptv_ds.data.shards.index import build_index
from tinygptv_ds.data.shards.remote import PIPE, RemoteShard, Shard, list_shards
from tinygptv_ds.errors import DataError


def expand_shards(pattern: str | list[str], root: Path | None = None, *, allow_pipe: bool = False) -> list[Shard]:
    """The tars that `pattern` names: braces (``{00000..01255}.tar``), wildcards, a folder (its ``*.tar``), or a list.

    Relative patterns are taken from `root`. A URL (``https://``, ``s3://``, whatever fsspec knows) gives remote shards;
    one that ends in ``/`` is a folder. With `allow_pipe` so does ``pipe:COMMAND``, a tar being the output of the shell
    command; braces expand in it, too. Remote shards named by braces are not looked for here. The order is that of the
    braces and the list, sorted within wildcards and folders.

    Raises DataError if a named file does not exist, a wildcard or folder gives none, a file comes twice, or a command
    comes where none is allowed.
    """
    found: list[Shard] = []
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        found += _expand(entry, root, allow_pipe)
    twice = next((path for path in found if found.count(path) > 1), None) if len(set(found)) < len(found) else None
    if twice:
        raise DataError(f"shards: {twice} is listed more than once; list every shard once")
    return found


def _expand(pattern: str, root: Path | None, allow_pipe: bool) -> list[Shard]:
    try:
        named = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise DataError(f"shards: unbalanced braces in {pattern!r}") from None
    if "://" in pattern or any(name.startswith(PIPE) for name in named):
        return [shard for name in named for shard in _remote(name, allow_pipe)]
    return _local(pattern, named, root or Path())


def _remote(url: str, allow_pipe: bool) -> list[RemoteShard]:
    if url.startswith(PIPE) and not allow_pipe:
        raise DataError(f"shards: {url!r} would run a shell command, which only a recipe may allow, by data.allow_pipe")
    listed = not url.startswith(PIPE) and (url.endswith("/") or "*" in url)
    return list_shards(url) if listed else [RemoteShard(url)]


def _local(pattern: str, named: list[str], root: Path) -> list[Path]:
    found, missing = [], []
    for name in named:
        path = root / Path(name).expanduser()
        if path.is_dir():
            tars = sorted(path.glob("*.tar"))
        elif path.is_file():
            tars = [path]
        elif glob.has_magic(name):
            tars = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 (the pattern may be absolute)
        else:
            tars = []
        found += tars
        if not tars:
            missing.append(path)
    if missing:
        what = f"holds no *.tar: {missing[0]}" if missing[0].is_dir() else f"not found: {missing[0]}"
        count = f" (and {len(missing) - 1} more of {len(named)} named)" if len(missing) > 1 else ""
        raise DataError(f"shards {pattern!r}: {what}{count}; check the path, or narrow the pattern to what is there")
    return found


def new_archive(file: BinaryIO) -> tarfile.TarFile:
    """A tar to fill with `add_sample`; to be closed."""
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def add_sample(archive: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Append a sample, its members by suffix; without times and owners, so that the bytes depend on it alone."""
    for suffix, data in sorted(members.items()):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size, info.mode = len(data), 0o444
        archive.addfile(info, io.BytesIO(data))
    archive.members = []  # tarfile would keep them all


class ShardWriter:
    """Write samples to ``00000.tar``, ``00001.tar``, ... with an index next to each, numbered from `first` on.

    The bytes depend on nothing but the samples. A shard carries its final name only when it is complete; leaving the
    ``with`` block by an exception removes the one under way. `tars` lists what has been completed.
    """

    def __init__(self, out_dir: Path, samples_per_shard: int = 10_000, *, first: int = 0) -> None:
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.tars: list[Path] = []
        self._out_dir = out_dir
        self._samples_per_shard = samples_per_shard
        self._first = first
        self._open: BinaryIO | None = None
        self._written = 0

    def __enter__(self) -> Self:
        self._out_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._abandon()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: `members` by suffix. Keys must be unique and hold no dot in their last part."""
        if self._open is None:
            self._open = self._temporary().open("wb")
            self._archive = new_archive(self._open)
        add_sample(self._archive, key, members)
        self._written += 1
        if self._written == self._samples_per_shard:
            self._complete()

    def finish(self) -> None:
        """Complete the last shard."""
        if self._open is not None:
            self._complete()

    def _name(self) -> str:
        return f"{self._first + len(self.tars):05d}.tar"

    def _temporary(self) -> Path:
        """One of this process alone: another one may still be about to notice that its parent is gone."""
        return self._out_dir / f".{self._name()}.{os.getpid()}.tmp"

    def _complete(self) -> None:
        self._archive.close()
        self._open.flush()
        os.fsync(self._open.fileno())
        self._open.close()
        tar = self._out_dir / self._name()
        self._temporary().replace(tar)
        self._open, self._written = None, 0
        build_index(tar)
        self.tars.append(tar)

    def _abandon(self) -> None:
        if self._open is not None:
            with contextlib.suppress(OSError):  # such as the full disk that brought us here
                self._open.close()
            self._temporary().unlink(missing_ok=True)
            self._open = None
