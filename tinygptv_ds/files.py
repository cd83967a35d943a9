"""Files and folders that appear under their name complete or not at all, and hashes of files. No torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 1 << 20


def cache_home() -> Path:
    """The program's folder in the user's cache (``XDG_CACHE_HOME``, else ``~/.cache``); it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinygptv_ds"


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into; it gets the name `out` when the block ends well, and is removed when it does not.

    One that is already there stays until then and is replaced. A killed process leaves `out.partial`, which the next
    attempt removes.
    """
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A path to write a file at; it gets the name `out` when the block ends well, and is removed when it does not."""
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        sync(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(out)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also among processes that write the same one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync(file: Path) -> None:
    """Have the system put a file's content, or a folder's list of names, on the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """The hash of a file; `progress` is called with the number of bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
