"""Files on disk: atomic writes, hashes, file locks, journals, and comparison of recorded settings. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tinygptv_ds.errors import TinyGPTVError

_BLOCK = 1 << 20
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def cache_home() -> Path:
    """Return the program's folder in the user's cache (``XDG_CACHE_HOME``, else ``~/.cache``), or a
    temporary one of a user without home; it may not exist yet."""
    own = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own or Path.home() / ".cache") / "tinygptv_ds"
    except RuntimeError:  # a user without an entry in /etc/passwd, and no HOME
        return Path(tempfile.gettempdir()) / f"tinygptv_ds-{os.getuid()}"


def read_text(path: Path, most: int) -> str:
    """Return the content of a text file that a user has written.

    Raises:
        OSError: it cannot be read, has more than `most` bytes, or is no file.
        ValueError: it is not UTF-8, or the path holds a null byte.
    """
    check_is_file(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content.decode("utf-8")


def check_is_file(path: Path) -> None:
    """Raise OSError unless a path is a regular file: opening a FIFO waits for a writer, and a device may be endless."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        known = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(known, "it is a folder" if known == errno.EISDIR else "it is a pipe or a device", str(path))


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to `out` if the block succeeds, and removed if not.

    One that is already there stays until then and is replaced. A killed process leaves `out.partial`, which the next
    attempt removes.
    """
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    for leftover in (partial, old):
        remove(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        sync(partial)
    except BaseException as error:
        _name_file(error, out)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if os.path.lexists(out):  # also a file or a link
        out.rename(old)
    partial.rename(out)
    sync(out.parent)
    with contextlib.suppress(OSError):  # the next attempt removes it
        remove(old)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """Yield a path to write a file at, which is renamed to `out` if the block succeeds, and removed if not."""
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        sync(partial)
    except BaseException as error:
        _name_file(error, out)
        partial.unlink(missing_ok=True)
        raise
    partial.replace(out)


def _name_file(error: BaseException, path: Path) -> None:
    """Complete an error of the file system that, as one of writing does, names no file."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; it may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also among processes that write the same one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        with contextlib.suppress(OSError):  # some network file systems know no permissions, and need none
            Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync(file: Path) -> None:
    """Have the system put a file's content, or a folder's list of names, on the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        sync_open(handle)
    finally:
        os.close(handle)


def sync_open(descriptor: int) -> None:
    """Do as `sync` for an open file. A file system that cannot sync, as some FUSE and SMB for folders, is no error."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sha256(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """Return the hash of a file; `progress` is called with the number of bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


class LockedError(TinyGPTVError):
    """A lock file that another process, or another part of this one, holds."""


class LockRemovedError(LockedError):
    """A lock file that its last holder removed while this process was opening it."""


class LocksUnsupportedError(TinyGPTVError):
    """A file system without file locks, for example an NFS mount with the option `nolock`."""


class FileLock:
    """An exclusive lock on a file, from `lock_file`; it ends with `release`, with its `with` block or with the process.

    It belongs to this object, not to the process: a second `lock_file` in the same process fails, too. A process forked
    meanwhile inherits the open file; `release` here ends the lock nevertheless.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def fileno(self) -> int:
        """Return the open file's number, for a child process that is to hold the lock as long as it lives."""
        if self._descriptor is None:
            raise ValueError(f"{self.path}: the lock is released")
        return self._descriptor

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                # Closing alone would leave the lock to a process forked in between, which has the same file open.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_file(path: Path, *, wait: bool = False) -> FileLock:
    """Take the exclusive lock on a file, which is created if it is missing; its content is neither read nor changed.

    The lock is the kernel's `flock`, so it ends with the process, however that ends. The package `filelock` is no help:
    it polls where this waits, falls back to marker files that can outlive their process, and is slow to import.

    Args:
        path: any file, also one that is written to while it is locked.
        wait: whether to wait for the present holder.

    Raises:
        LockedError: another holder has it, and `wait` is False.
        LockRemovedError: the last holder removed the file after this call had opened it. What that holder finished is
            there now; to continue, start again from looking for it.
        LocksUnsupportedError: the file system has no locks.
        OSError: the file cannot be created or opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.fstat(descriptor).st_nlink == 0:
            raise LockRemovedError(f"{path}: another process has just removed this lock file; start again")
    except BlockingIOError:
        os.close(descriptor)
        raise LockedError(f"{path}: another process holds this lock file; let it finish") from None
    except OSError as error:
        os.close(descriptor)
        if error.errno not in _NO_LOCKS:
            raise
        raise LocksUnsupportedError(
            f"{path}: the file system has no file locks ({error.strerror}); choose a folder of one that has them"
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return FileLock(path, descriptor)


class Journal:
    """An append-only file of JSON lines with one writer, which survives a kill at any moment.

    Opening it removes a last line that a kill has cut short, so where two writers are possible, hold a lock before (on
    the journal itself, if nothing else is at hand). Other processes may read it meanwhile with `read_journal`.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; its folder must exist."""
        self._file = path.open("ab")
        _cut_torn_line(path)

    def append(self, *entries: object) -> None:
        """Append one line for each entry, in one write; the system has them when this returns."""
        self._file.write("".join(f"{json_line(entry)}\n" for entry in entries).encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> Iterator[Any]:
    """Yield the entries of a `Journal`, without a last line that is not whole; none if there is no file."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)


def json_line(value: object) -> str:
    """Return `value` as JSON on one line; it is ASCII where a lone surrogate could not be encoded as UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    encodable = text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
    return text if encodable else json.dumps(value)


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            sync_open(file.fileno())


def fingerprint_differences(
    recorded: Mapping[str, Any], current: Mapping[str, Any], *, recorded_in: str = "there", current_in: str = "here"
) -> dict[str, str]:
    """Compare the recorded settings of earlier work with the current ones.

    Args:
        recorded: plain values by name, for example from a settings file. A missing name counts as None.
        current: the same of the present call.
        recorded_in: where the recorded values are, for the lines, for example "in the checkpoint".
        current_in: the same for the current ones.

    Returns:
        One line for each name that differs, in the order of `recorded`, then `current`, by name:
        `{"seed": "seed: 1 in the checkpoint, 2 here"}`.
    """
    names = [name for name in {**recorded, **current} if recorded.get(name) != current.get(name)]
    return {
        name: f"{name}: {_shown(recorded, name)} {recorded_in}, {_shown(current, name)} {current_in}" for name in names
    }


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False, default=str) if name in values else "nothing"
