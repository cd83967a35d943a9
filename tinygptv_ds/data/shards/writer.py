"""Writing WebDataset tars, with an index next to each, through webdataset's `TarWriter`."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from tinygptv_ds.data.shards.index import build_index
from tinygptv_ds.errors import DataError
from tinygptv_ds.files import sync_open

if TYPE_CHECKING:
    from webdataset import TarWriter


def open_tar(file: BinaryIO) -> TarWriter:
    """Return a writer for `add_sample` whose bytes depend on the samples alone, not on time or user; to be closed."""
    from webdataset import TarWriter  # it imports torch (2 s), which only writing should wait for

    writer = TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False, keep_meta=True)
    # Remove when TarWriter hands its argument `format` to tarfile (1.0.2 ignores it): Python's default, pax, stores
    # long names and other letters than ASCII in other bytes.
    writer.tarstream.format = tarfile.USTAR_FORMAT
    return writer


def add_sample(writer: TarWriter, key: str, members: Mapping[str, bytes]) -> None:
    """Append a sample, its members by suffix, in the order of the suffixes."""
    writer.write({"__key__": key, **members})
    writer.tarstream.members = []  # tarfile would keep the headers of all members in memory


class ShardWriter:
    """Writes samples to ``00000.tar``, ``00001.tar``, ... with an index next to each.

    The bytes depend on the samples alone. A shard gets its final name only when it is complete; leaving the ``with``
    block by an exception removes the unfinished one.

    Args:
        out_dir: folder of the shards, made if it does not exist.
        samples_per_shard: samples of every shard but the last.
        first: number of the first shard.

    Attributes:
        tars: the completed shards.
    """

    def __init__(self, out_dir: Path, samples_per_shard: int = 10_000, *, first: int = 0) -> None:
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.tars: list[Path] = []
        self._out_dir = out_dir
        self._samples_per_shard = samples_per_shard
        self._first = first
        self._open: tuple[BinaryIO, TarWriter] | None = None
        self._written = 0  # samples in the open shard

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
        """Add a sample, its members by suffix. Keys must be unique, without a dot in their last part."""
        if self._open is None:
            file = self._temporary().open("wb")
            self._open = file, open_tar(file)
        add_sample(self._open[1], key, members)
        self._written += 1
        if self._written == self._samples_per_shard:
            self.finish()

    def finish(self) -> None:
        """Complete the open shard, if there is one."""
        if self._open is None:
            return
        file, writer = self._open
        writer.close()
        file.flush()
        sync_open(file.fileno())
        file.close()
        tar = self._out_dir / self._name()
        self._temporary().replace(tar)
        self._open, self._written = None, 0
        build_index(tar)
        self.tars.append(tar)

    def _name(self) -> str:
        return f"{self._first + len(self.tars):05d}.tar"

    def _temporary(self) -> Path:
        """Return a path of this process alone: a process whose parent has ended may still be writing the same shard."""
        return self._out_dir / f".{self._name()}.{os.getpid()}.tmp"

    def _abandon(self) -> None:
        for opened in reversed(self._open or ()):
            with contextlib.suppress(OSError):  # such as the full disk that was the reason
                opened.close()
        self._temporary().unlink(missing_ok=True)
        self._open = None
