"""The disk quota of the shard cache: locks between processes, and space reserved for each download within the bound."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from tinygptv_ds.errors import DataError
from tinygptv_ds.files import FileLock, LockedError, LockRemovedError, LocksUnsupportedError, lock_file

FIRST_RESERVATION = 256 << 20  # bytes, for a tar of unknown size; doubled as it grows
_WAIT_SECONDS = 0.1


class CacheFullError(DataError):
    """A download has outgrown its reservation, and other downloads hold the rest of the cache."""


def lock_cache_file(path: Path) -> FileLock:
    """Wait for the exclusive lock on a file of the cache.

    Raises:
        DataError: the folder has no locks.
    """
    while True:
        lock = _lock(path, wait=True)
        if lock is not None:
            return lock


def try_cache_file(path: Path) -> FileLock | None:
    """Take the exclusive lock on a file of the cache; None if another thread or process has it.

    Raises:
        DataError: the folder has no locks.
    """
    return _lock(path, wait=False)


def _lock(path: Path, *, wait: bool) -> FileLock | None:
    try:
        return lock_file(path, wait=wait)
    except LockRemovedError:  # someone is deleting the cache folder: lock its successor
        return _lock(path, wait=wait)
    except LockedError:
        return None
    except (OSError, LocksUnsupportedError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the file system has no file locks"
        raise DataError(f"{path}: cannot lock it: {reason}; set data.cache_dir to a folder of a local disk") from error


class Reservation:
    """The disk space reserved for one download: a sparse file ``NAME.reserved`` of that size next to its ``NAME.tar``.

    All tars and reservations of the folder together never exceed `max_bytes`: the least recently used tars are removed
    first, and what killed processes left. Who has a reservation holds ``NAME.lock``.

    Args:
        tar: where the download will be.
        max_bytes: bound of the whole cache.
        what: names the shard in messages.
    """

    def __init__(self, tar: Path, max_bytes: int, what: str) -> None:
        self._file = tar.with_suffix(".reserved")
        self._max_bytes = max_bytes
        self._what = what
        self._size = 0

    def wait_for(self, size: int | None) -> None:
        """Reserve `size` bytes (None: unknown) as soon as other downloads leave them free.

        Raises:
            DataError: that is more than the whole cache may hold.
        """
        wanted = min(FIRST_RESERVATION, self._max_bytes) if size is None else size
        while not self._reserve(wanted):
            time.sleep(_WAIT_SECONDS)

    def fit(self, arrived: int) -> None:
        """Double the reservation if `arrived` bytes exceed it.

        Raises:
            CacheFullError: other downloads hold the rest.
            DataError: even the whole cache is too small.
        """
        while arrived > self._size:
            if not self._reserve(self._next_size(arrived)):
                raise CacheFullError(f"{self._what}: the cache is full of other downloads")

    def start_again(self) -> None:
        """Wait for twice the space while holding none: two downloads that hold some could wait for each other."""
        wanted = self._next_size(self._size + 1)
        self.release()
        self.wait_for(wanted)

    def release(self) -> None:
        """Leave the space to others."""
        self._file.unlink(missing_ok=True)
        self._size = 0

    def _next_size(self, least: int) -> int:
        return max(least, min(2 * self._size, self._max_bytes))

    def _reserve(self, size: int) -> bool:
        if size > self._max_bytes:
            raise DataError(
                f"{self._what}: the tar has {_gigabytes(size)} or more, and the cache may hold "
                f"{_gigabytes(self._max_bytes)}; raise data.cache_gb, best to several windows of shards"
            )
        folder = self._file.parent
        with lock_cache_file(folder / "quota.lock"):
            # Reservations first: a download that ends in between may be counted twice, but is never missed.
            reserved = sum(_reserved_bytes(other) for other in folder.glob("*.reserved") if other != self._file)
            tars = {tar: _bytes(tar) for tar in folder.glob("*.tar")}
            free = self._max_bytes - size - reserved - sum(tars.values())
            for tar in sorted(tars, key=_last_use):
                if free >= 0:
                    break
                free += tars[tar] if _remove_unused(tar) else 0
            if free < 0:
                return False
            with self._file.open("ab") as file:
                file.truncate(size)
        self._size = size
        return True


def _reserved_bytes(reservation: Path) -> int:
    """Return the bytes that a running download has reserved; remove what a killed one left."""
    lock = try_cache_file(reservation.with_suffix(".lock"))
    if lock is None:
        return _bytes(reservation)
    with lock:
        reservation.with_suffix(".partial").unlink(missing_ok=True)
        reservation.unlink(missing_ok=True)
    return 0


def _remove_unused(tar: Path) -> bool:
    """Remove a tar unless a process is opening it now; return whether it was removed."""
    lock = try_cache_file(tar.with_suffix(".lock"))
    if lock is None:
        return False
    with lock:
        tar.unlink(missing_ok=True)
    return True


def _bytes(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _last_use(tar: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return tar.with_suffix(".lock").stat().st_mtime_ns
    return 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
