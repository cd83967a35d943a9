"""Disk space of the shard cache: locks between processes, and room for a download within the cache's bound."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tinygptv_ds.errors import DataError

FIRST_ROOM = 256 << 20  # for a tar of unknown size; doubled as it grows
_WAIT_SECONDS = 0.1


class NoRoomError(DataError):
    """A download has outgrown its room, and there is no more at once."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` within the block; False if another thread or process has it and we do not `wait`.

    The kernel releases it when the process ends, however it ends. Raises DataError where the folder has no locks.
    """
    file = -1
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except BlockingIOError:
        held = False
    except OSError as error:
        raise DataError(
            f"{path}: cannot lock it: {error.strerror}; set data.cache_dir to a folder of a local disk"
        ) from error
    try:
        yield held
    finally:
        if held:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open, too
        os.close(file)


class Room:
    """What is set aside for one download: a sparse file ``NAME.room`` next to its ``NAME.tar``, as long as the room.

    All tars and rooms of the folder together never exceed `max_bytes`: tars that were not used for longest are removed
    first, and what killed processes left. Whoever has a Room holds ``NAME.lock``.
    """

    def __init__(self, tar: Path, max_bytes: int, what: str) -> None:
        self._file = tar.with_suffix(".room")
        self._max_bytes = max_bytes
        self._what = what
        self._size = 0

    def wait_for(self, size: int | None) -> None:
        """Set `size` bytes aside (None: unknown), as soon as other downloads leave them free.

        Raises DataError if that is more than the whole cache may hold.
        """
        wanted = min(FIRST_ROOM, self._max_bytes) if size is None else size
        while not self._set_aside(wanted):
            time.sleep(_WAIT_SECONDS)

    def fit(self, arrived: int) -> None:
        """Double the room if `arrived` bytes exceed it.

        Raises NoRoomError if others have the rest, and DataError if even the whole cache is too small.
        """
        while arrived > self._size:
            if not self._set_aside(self._next_size(arrived)):
                raise NoRoomError(f"{self._what}: the cache is full of other downloads")

    def start_again(self) -> None:
        """Wait for twice the room, holding none meanwhile: two that wait with some in hand could wait for ever."""
        wanted = self._next_size(self._size + 1)
        self.give_back()
        self.wait_for(wanted)

    def give_back(self) -> None:
        """Leave the room to others."""
        self._file.unlink(missing_ok=True)
        self._size = 0

    def _next_size(self, least: int) -> int:
        return max(least, min(2 * self._size, self._max_bytes))

    def _set_aside(self, size: int) -> bool:
        if size > self._max_bytes:
            raise DataError(
                f"{self._what}: the tar has {_gigabytes(size)} or more, and the cache may hold "
                f"{_gigabytes(self._max_bytes)}; raise data.cache_gb, best to several windows of shards"
            )
        folder = self._file.parent
        with locked(folder / "room.lock"):
            # Rooms first: a download that ends meanwhile may count twice, but not be overlooked.
            rooms = sum(_claimed(room) for room in folder.glob("*.room") if room != self._file)
            tars = {tar: _bytes(tar) for tar in folder.glob("*.tar")}
            free = self._max_bytes - size - rooms - sum(tars.values())
            for tar in sorted(tars, key=_last_use):
                if free >= 0:
                    break
                free += tars[tar] if _removed(tar) else 0
            if free < 0:
                return False
            with self._file.open("ab") as file:
                file.truncate(size)
        self._size = size
        return True


def _claimed(room: Path) -> int:
    """Bytes that a running download has set aside; what a killed one left is removed."""
    with locked(room.with_suffix(".lock"), wait=False) as abandoned:
        if not abandoned:
            return _bytes(room)
        room.with_suffix(".partial").unlink(missing_ok=True)
        room.unlink(missing_ok=True)
    return 0


def _removed(tar: Path) -> bool:
    """Remove a tar, unless somebody is just opening it."""
    with locked(tar.with_suffix(".lock"), wait=False) as unused:
        if unused:
            tar.unlink(missing_ok=True)
    return unused


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
