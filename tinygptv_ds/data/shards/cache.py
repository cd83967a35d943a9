"""Local copies of remote shards: one folder per node, shared by all its processes, within a bound.

Files of a shard `NAME`:

- `NAME.tar`: the shard, there only when complete.
- `NAME.tar.idx`: its index, which stays for the count when the tar is removed.
- `NAME.lock`: held while the tar is fetched, opened or removed; its time is that of the last use.
- `NAME.adjacent`: the index next to the remote tar, or its first bytes where only the count was wanted.
- `NAME.partial`, `NAME.reserved`: during a download, what has arrived, and the space that is reserved for it.
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
from tinygptv_ds.config.paths import expand_user
from tinygptv_ds.data.shards.disk_quota import CacheFullError, Reservation, lock_cache_file
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
_FAILED_SECONDS = 300  # before a shard that could not be fetched is tried again
_THREADS = 16
_GB = 10**9
_Result = TypeVar("_Result")


class ShardCache:
    """Fetches remote shards into `folder` and keeps the most recently used, at most `max_bytes` of tars.

    Indexes (about a thousandth of their tars) are not counted. A shard that is open stays readable when it is removed,
    so its disk space is free only when all readers have closed it. A copy is used as long as it exists, even if the
    remote tar changes.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = 100 * _GB) -> None:
        self._folder = folder or cache_home() / "shards"
        self._max_bytes = max_bytes
        self._counted: dict[RemoteShard, int] = {}  # what the order of samples is based on
        self._failed: dict[RemoteShard, tuple[float, str]] = {}

    def open(self, shard: RemoteShard) -> tuple[int, ShardIndex]:
        """Return (file descriptor, index) of the complete tar, fetched if necessary; the caller closes the file.

        Raises:
            DataError: it cannot be fetched in several attempts; raised at once for the next five minutes.
        """
        with self._fetched(shard) as (tar, index):
            return os.open(tar, os.O_RDONLY | os.O_CLOEXEC), index

    def fetch(self, shard: RemoteShard) -> Path:
        """Return the complete tar, which stays until others need its space; raises as `open`."""
        with self._fetched(shard) as (tar, _):
            return tar

    def index(self, shard: RemoteShard) -> ShardIndex:
        """Return a shard's index; the tar is fetched only if there is no index next to it or in the cache.

        The index next to the tar comes first, so that all nodes see the same, whichever of them has the tar. Raises as
        `open`.
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
        """Return the number of samples of each shard: from the cache, the index next to it, or by fetching it.

        One process of a node makes the requests; the others wait for its results.

        Raises:
            DataError: a shard does not exist.
        """
        if not shards:
            return []
        self._make_folder()
        if any(self._known(shard) is None for shard in shards):
            urls = "\n".join(shard.url for shard in shards)
            with lock_cache_file(self._folder / f"{_digest(urls)}.counting"):
                self._count([shard for shard in shards if self._known(shard) is None])
        counts = []
        for shard in shards:
            header = self._known(shard)
            if header is None:
                raise DataError(
                    f"{shard}: its index has vanished from {self._folder}; leave the folder alone during a run"
                )
            counts.append(header.samples)
        self._counted |= zip(shards, counts, strict=True)
        return counts

    def _count(self, shards: list[RemoteShard]) -> None:
        """Store the counts of all `shards` in the cache."""
        found = _for_each(self._store_header, shards, "counting shards")
        without = [shard for shard, stored in zip(shards, found, strict=True) if not stored]
        if without:
            log.warning(
                "%s%s: no index that fits is next to the tar, so the whole tar is fetched to be counted; make indexes "
                "with 'tinygptv-ds index' where the tars are, and store them next to the tars",
                *(without[0], f" and {len(without) - 1} more" if without[1:] else ""),
            )
        _for_each(self.fetch, without, "fetching shards")

    def _known(self, shard: RemoteShard) -> IndexHeader | None:
        tar = self._tar(shard)
        headers = (header_of(_start(tar.with_suffix(suffix))) for suffix in (".adjacent", ".tar.idx"))
        return next((header for header in headers if header is not None), None)

    def _store_header(self, shard: RemoteShard) -> bool:
        """Store the first bytes of the index next to the tar; return False if there is none that fits."""
        size = remote_size(shard)
        start = adjacent_index(shard, HEADER_BYTES)
        header = header_of(start)
        if header is None or header.tar_size != size:
            return False
        write_atomically(self._tar(shard).with_suffix(".adjacent"), start)
        return True

    @contextlib.contextmanager
    def _fetched(self, shard: RemoteShard) -> Iterator[tuple[Path, ShardIndex]]:
        """Yield the complete tar, which no process removes within the block, and its index."""
        until, message = self._failed.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise DataError(message)
        self._make_folder()
        tar = self._tar(shard)
        with lock_cache_file(tar.with_suffix(".lock")):
            try:
                os.utime(tar.with_suffix(".lock"))
                if not tar.exists():
                    self._download(shard, tar)
                index = _index(shard, tar)  # built from every fetched copy: a remote tar may have been replaced
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
                "index next to it belongs to another tar; make it again (tinygptv-ds index) and restart"
            )

    def _download(self, shard: RemoteShard, tar: Path) -> None:
        partial, size = tar.with_suffix(".partial"), remote_size(shard)
        reservation = Reservation(tar, self._max_bytes, str(shard))
        try:
            reservation.wait_for(size)
            while not _download_within(reservation, shard, partial, size):
                reservation.start_again()
            sync(partial)
            partial.replace(tar)
        except OSError as error:
            raise DataError(f"{self._folder}: cannot write the shard cache: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
            reservation.release()

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
    """Return the cache that a recipe configures."""
    folder = None if data.cache_dir is None else expand_user(data.cache_dir)
    return ShardCache(folder, int(data.cache_gb * _GB))


def count_samples(shards: Sequence[Shard], cache: ShardCache) -> list[int]:
    """Return the number of samples of each shard, local or remote, through their indexes.

    Raises:
        DataError: a shard does not exist.
    """
    local = iter(sample_counts([shard for shard in shards if isinstance(shard, Path)]))
    remote = iter(cache.counts([shard for shard in shards if isinstance(shard, RemoteShard)]))
    return [next(local if isinstance(shard, Path) else remote) for shard in shards]


def _index(shard: RemoteShard, tar: Path) -> ShardIndex:
    try:
        return load_index(tar)
    except DataError as error:
        tar.unlink(missing_ok=True)  # the server may send a tar next time
        raise DataError(f"{shard}: the fetched file cannot be used: {error}") from error


def _download_within(reservation: Reservation, shard: RemoteShard, partial: Path, size: int | None) -> bool:
    try:
        download(shard, partial, size, reservation.fit)
    except CacheFullError:
        partial.unlink(missing_ok=True)
        return False
    return True


def _for_each(action: Callable[[RemoteShard], _Result], shards: list[RemoteShard], what: str) -> list[_Result]:
    """Return the results of `action`, called in threads, with a progress bar from 2 s on; the first error ends it."""
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
