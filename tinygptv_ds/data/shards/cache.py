"""Local copies of remote shards: one folder a node, shared by all its processes, within a bound.

A shard `NAME` is `NAME.tar`, there only when complete; its index `NAME.tar.idx`, which stays for the count when the
tar goes; and `NAME.lock`, which whoever fetches, opens or removes it holds, and whose time is that of the last use.
`NAME.adjacent` is the index next to the remote tar, or its start where only the count was wanted. While the tar is
fetched, `NAME.partial` holds what has come and `NAME.room` stands for the space that is set aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from tinygptv_ds.config.data_section import DataSection
from tinygptv_ds.data.shards.disk_quota import NoRoomError, Room, locked
from tinygptv_ds.data.shards.index import (
    HEADER_BYTES,
    IndexHeader,
    ShardIndex,
    header_of,
    load_index,
    sample_counts,
)
from tinygptv_ds.data.shards.remote import RemoteShard, Shard, adjacent_index, download, remote_size
from tinygptv_ds.errors import DataError
from tinygptv_ds.files import cache_home, sync, write_atomically

log = logging.getLogger(__name__)
_FAILED_SECONDS = 300  # a shard that cannot be had is not tried again for so long
_THREADS = 16
_GB = 10**9
_Result = TypeVar("_Result")


class ShardCache:
    """Fetches remote shards into `folder` and keeps the latest used, `max_bytes` of tars at most.

    Indexes (about a thousandth of their tars) come on top. A shard that is open stays readable when it is removed, so
    its disk space is free only when all readers have closed it. A copy is used as long as it is there, whatever
    becomes of the remote tar.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = 100 * _GB) -> None:
        self._folder = folder or cache_home() / "shards"
        self._max_bytes = max_bytes
        self._counted: dict[RemoteShard, int] = {}  # what the order of samples rests on
        self._failed: dict[RemoteShard, tuple[float, str]] = {}

    def open(self, shard: RemoteShard) -> tuple[int, ShardIndex]:
        """(file descriptor, index) of the complete tar, fetched if need be; the caller closes the file.

        Raises DataError if it cannot be had: after some attempts, and then at once for the next five minutes.
        """
        with self._fetched(shard) as (tar, index):
            return os.open(tar, os.O_RDONLY | os.O_CLOEXEC), index

    def fetch(self, shard: RemoteShard) -> Path:
        """The complete tar, there until others need its room; errors as in `open`."""
        with self._fetched(shard) as (tar, _):
            return tar

    def index(self, shard: RemoteShard) -> ShardIndex:
        """Its index, without the tar where one lies next to it or has been kept; errors as in `open`.

        The one next to the tar comes first, so that all nodes see the same, whichever of them has the tar.
        """
        self._make_folder()
        adjacent, kept = (self._tar(shard).with_suffix(suffix) for suffix in (".adjacent", ".tar.idx"))
        with contextlib.suppress(OSError, ValueError):
            return ShardIndex.from_bytes((adjacent if adjacent.exists() else kept).read_bytes())
        with contextlib.suppress(ValueError):  # torn
            if adjacent.exists():
                data = adjacent_index(shard)
                index = ShardIndex.from_bytes(data)
                write_atomically(adjacent, data)
                return index
        with self._fetched(shard) as (_, index):
            return index

    def counts(self, shards: Sequence[RemoteShard]) -> list[int]:
        """Samples of each shard: as remembered, or else from the index next to it, or else by fetching it.

        Of the processes of a node one asks and the others wait for its answers. Raises DataError for a shard that is
        not there.
        """
        if not shards:
            return []
        self._make_folder()
        known = [self._known(shard) for shard in shards]
        if None in known:
            urls = "\n".join(shard.url for shard in shards)
            with locked(self._folder / f"{_digest(urls)}.counting"):
                self._count([shard for shard in shards if self._known(shard) is None])
            known = [self._known(shard) for shard in shards]
        lost = next((shard for shard, header in zip(shards, known, strict=True) if header is None), None)
        if lost is not None:
            raise DataError(f"{lost}: its index has vanished from {self._folder}; leave the folder alone during a run")
        counts = [header.samples for header in known]
        self._counted |= zip(shards, counts, strict=True)
        return counts

    def _count(self, shards: list[RemoteShard]) -> None:
        """Make the counts of all `shards` known."""
        asked = _for_each(self._remember_start, shards, "counting shards")
        without = [shard for shard, found in zip(shards, asked, strict=True) if not found]
        if without:
            log.warning(
                "%s%s: no index that fits lies next to the tar, so that the whole of it is fetched to be counted; make "
                "indexes with 'python -m tinygptv_ds index' where the tars are, and store them next to the tars",
                *(without[0], f" and {len(without) - 1} more" if without[1:] else ""),
            )
        _for_each(self.fetch, without, "fetching shards")

    def _known(self, shard: RemoteShard) -> IndexHeader | None:
        tar = self._tar(shard)
        headers = (header_of(_start(tar.with_suffix(suffix))) for suffix in (".adjacent", ".tar.idx"))
        return next((header for header in headers if header is not None), None)

    def _remember_start(self, shard: RemoteShard) -> bool:
        """Keep the start of the index next to the tar; False if there is none that fits."""
        size = remote_size(shard)
        start = adjacent_index(shard, HEADER_BYTES)
        header = header_of(start)
        if header is None or header.tar_size != size:
            return False
        write_atomically(self._tar(shard).with_suffix(".adjacent"), start)
        return True

    @contextlib.contextmanager
    def _fetched(self, shard: RemoteShard) -> Iterator[tuple[Path, ShardIndex]]:
        """The complete tar, which nobody removes within the block, and its index."""
        until, message = self._failed.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise DataError(message)
        self._make_folder()
        tar = self._tar(shard)
        with locked(tar.with_suffix(".lock")):
            try:
                os.utime(tar.with_suffix(".lock"))
                if not tar.exists():
                    self._download(shard, tar)
                index = _index(shard, tar)  # built from each copy that is fetched: a remote tar may have been replaced
                self._check_count(shard, tar, len(index))
            except DataError as error:
                self._failed[shard] = (time.monotonic() + _FAILED_SECONDS, str(error))
                raise
            yield tar, index

    def _check_count(self, shard: RemoteShard, tar: Path, samples: int) -> None:
        counted = self._counted.get(shard, samples)
        if counted != samples:
            for stale in (tar, tar.with_suffix(".adjacent")):
                stale.unlink(missing_ok=True)
            raise DataError(
                f"{shard}: holds {samples} samples, not {counted} as counted at the start: it was replaced, or the "
                "index next to it is another's; make that again (python -m tinygptv_ds index) and start again"
            )

    def _download(self, shard: RemoteShard, tar: Path) -> None:
        partial, size = tar.with_suffix(".partial"), remote_size(shard)
        room = Room(tar, self._max_bytes, str(shard))
        try:
            room.wait_for(size)
            while not _download_within(room, shard, partial, size):
                room.start_again()
            sync(partial)
            partial.replace(tar)
        except OSError as error:
            raise DataError(f"{self._folder}: cannot write the shard cache: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
            room.give_back()

    def _tar(self, shard: RemoteShard) -> Path:
        readable = re.sub(r"[^A-Za-z0-9_.-]", "_", shard.name.removesuffix(".tar"))[-60:]
        return self._folder / f"{_digest(shard.url)}-{readable}.tar"

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self._folder}: cannot make the shard cache: {error.strerror}; set data.cache_dir to a folder that "
                "can be written"
            ) from error


def open_cache(data: DataSection) -> ShardCache:
    """The cache that a recipe names."""
    folder = None if data.cache_dir is None else Path(data.cache_dir).expanduser()
    return ShardCache(folder, int(data.cache_gb * _GB))


def count_samples(shards: Sequence[Shard], cache: ShardCache) -> list[int]:
    """Samples of each shard, local or remote, through their indexes. Raises DataError for one that is not there."""
    local = iter(sample_counts([shard for shard in shards if isinstance(shard, Path)]))
    remote = iter(cache.counts([shard for shard in shards if isinstance(shard, RemoteShard)]))
    return [next(local if isinstance(shard, Path) else remote) for shard in shards]


def _index(shard: RemoteShard, tar: Path) -> ShardIndex:
    try:
        return load_index(tar)
    except DataError as error:
        tar.unlink(missing_ok=True)  # what was sent instead of a tar may be put right
        raise DataError(f"{shard}: what came cannot be used: {error}") from error


def _download_within(room: Room, shard: RemoteShard, partial: Path, size: int | None) -> bool:
    try:
        download(shard, partial, size, room.fit)
    except NoRoomError:
        partial.unlink(missing_ok=True)
        return False
    return True


def _for_each(action: Callable[[RemoteShard], _Result], shards: list[RemoteShard], what: str) -> list[_Result]:
    """The results of `action` in threads, with a progress bar if it takes its time; the first error ends it."""
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            return list(tqdm(pool.map(action, shards), what, len(shards), unit="shard", delay=2))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEADER_BYTES)
    except OSError:
        return b""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
