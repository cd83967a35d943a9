"""Small tars for tests, made by the standard library, and their contents as the index finds them."""

import errno
import io
import tarfile
from pathlib import Path

import pytest

from tinygptv_ds.data.shards import index as index_module
from tinygptv_ds.data.shards.index import load_index


def make_tar(path: Path, members: list[tuple[str, bytes]], **options: int) -> Path:
    """Write a tar with these members; `options` are those of `tarfile.open`."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    """Return the members of `count` samples, each with a jpg and a json member of `size` bytes."""
    return [(f"{i:04d}.{suffix}", bytes([i]) * size) for i in range(count) for suffix in ("jpg", "json")]


def contents(tar: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Return (key, content of each member by suffix) of every sample, read through the index."""
    index, data = load_index(tar), tar.read_bytes()
    return [
        (index.key(i), {m.suffix: data[m.offset : m.offset + m.size] for m in index.members(i)})
        for i in range(len(index))
    ]


def make_read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let writing an index into this folder fail as on a read-only file system."""
    write = index_module.write_atomically

    def refuse(path: Path, data: bytes) -> None:
        if path.parent == folder:
            raise OSError(errno.EROFS, "Read-only file system")
        write(path, data)

    monkeypatch.setattr(index_module, "write_atomically", refuse)
