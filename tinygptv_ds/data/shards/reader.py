"""Random access to the samples of the shards: (tar, index) -> record and image bytes."""

import contextlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinygptv_ds.data.shards.cache import ShardCache
from tinygptv_ds.data.shards.index import ShardIndex, load_index
from tinygptv_ds.data.shards.members import (
    CAPTION,
    RECORD,
    SKIPPED,
    ImageOrderError,
    Member,
    begins_as_image,
    image_members,
    unusable_image,
)
from tinygptv_ds.data.shards.records import REASONS, SampleError, parse_record, plain_record, read_record
from tinygptv_ds.data.shards.remote import RemoteShard, Shard
from tinygptv_ds.errors import DataError
from tinygptv_ds.retry import STORAGE


@dataclass(frozen=True)
class RawSample:
    """A sample: its record as processing/text.py reads it, and its images' encoded bytes or features, in order."""

    key: str
    record: dict[str, Any]
    images: tuple[bytes, ...]


class ShardReader:
    """Reads samples through the shard indexes, keeping the `max_open` most recently used shards open (two files each).

    Remote shards are fetched into `cache` (None: the user's, of 100 GB) when one of their samples is first read.
    Reading never moves a file's position, so processes may continue to use a reader that they inherited by a fork; one
    that is sent to another process opens its own files there.
    """

    def __init__(self, max_open: int = 256, cache: ShardCache | None = None) -> None:
        self._max_open = max_open
        self._cache = cache or ShardCache()
        self._shards: OrderedDict[Shard, tuple[int, ShardIndex]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_max_open": self._max_open, "_cache": self._cache, "_shards": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        while self._shards:
            os.close(self._shards.popitem()[1][0])

    def read(self, tar: Shard, index: int) -> RawSample:
        """Read sample number `index` of `tar`.

        Raises:
            SampleError: the sample, or the whole shard, cannot be used.
        """
        try:
            _, shard = self._shard(tar)
        except DataError as error:
            raise SampleError("unreadable_shard", str(error)) from error
        if not 0 <= index < len(shard):
            message = (
                f"{tar}: has {len(shard)} samples, none with number {index}; was it replaced after the run started?"
            )
            raise SampleError("unreadable_shard", message)
        key = shard.key(index)
        where = f"{tar}: sample {key}"
        members = shard.members(index)
        self._raise_if_skipped(tar, members, where)
        record = self._record(tar, members, where)
        images = self._images(tar, members, where)
        record = plain_record(record, len(images), where)
        return RawSample(key, record, tuple(self._read(tar, member, where) for member in images))

    def key(self, tar: Shard, index: int) -> str:
        """Return the key of a sample, for messages; its number if the shard cannot be read."""
        try:
            return self._shard(tar)[1].key(index)
        except (DataError, IndexError):
            return f"number {index}"

    def stored(self, tar: Shard, index: int) -> tuple[str, bytes | None, int]:
        """Return (key, the record as JSON or None, number of images) of a sample.

        The record is the ``json`` member as it is, or the caption that replaces it.

        Raises:
            SampleError: the storage failed.
            DataError: the shard cannot be opened.
        """
        _, shard = self._shard(tar)
        where = f"{tar}: sample {shard.key(index)}"
        members = shard.members(index)
        member = next((member for member in members if member.suffix == RECORD), None)
        record = None if member is None else self._read(tar, member, where)
        if any(member.suffix == CAPTION for member in members):
            with contextlib.suppress(SampleError):
                record = json.dumps(self._record(tar, members, where), ensure_ascii=False).encode()
        return shard.key(index), record, int(shard.lengths[index, 0])

    def _raise_if_skipped(self, tar: Shard, members: tuple[Member, ...], where: str) -> None:
        """Raise the SampleError that a shard of features stores in place of a sample that could not be used."""
        for member in members:
            if member.suffix == SKIPPED:
                noted = parse_record(self._read(tar, member, where), where)
                reason = noted.get("reason")
                raise SampleError(reason if reason in REASONS else "bad_record", str(noted.get("message")))

    def _record(self, tar: Shard, members: tuple[Member, ...], where: str) -> dict[str, Any]:
        """Return the record as it is stored, or the caption that replaces it."""
        return read_record(members, lambda member: self._read(tar, member, where), where)

    def _images(self, tar: Shard, members: tuple[Member, ...], where: str) -> list[Member]:
        """Return the images in their order. Where none has the name of an image, members that begin as one count."""
        try:
            images = image_members(members)
        except ImageOrderError as error:
            raise SampleError(error.reason, f"{where}: {error}") from error
        if not images:
            images = [member for member in members if begins_as_image(member, partial(self._read, tar, where=where))]
            if len(images) > 1:
                names = " and ".join(f".{member.suffix}" for member in images)
                message = f"{where}: which images, in which order, are {names}? Name them 0.jpg, 1.jpg, ..."
                raise SampleError("ambiguous_images", message)
        for member in images:
            problem = unusable_image(member)
            if problem is not None:
                raise SampleError(problem[0], f"{where}: {problem[1]}")
        return images

    def _shard(self, tar: Shard) -> tuple[int, ShardIndex]:
        """Return (file descriptor, index) of `tar`, opened if necessary."""
        if tar in self._shards:
            self._shards.move_to_end(tar)
            return self._shards[tar]
        self._shards[tar] = self._cache.open(tar) if isinstance(tar, RemoteShard) else _open(tar)
        if len(self._shards) > self._max_open:
            os.close(self._shards.popitem(last=False)[1][0])
        return self._shards[tar]

    def _read(self, tar: Shard, member: Member, where: str) -> bytes:
        """Read one member, with several attempts if the storage fails."""
        file, _ = self._shard(tar)
        try:
            data = STORAGE.call(where, lambda: _pread(file, member), lambda: self._reread(tar, member))
        except (OSError, DataError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise SampleError("unreadable", f"{where}: reading .{member.suffix} failed repeatedly: {what}") from error
        if len(data) < member.size:
            raise SampleError("truncated", f"{where}: .{member.suffix} ends after {len(data)} of {member.size} bytes")
        return data

    def _reread(self, tar: Shard, member: Member) -> bytes:
        """Read through a new file descriptor: one of a network file system may have become stale."""
        file, index = self._shards[tar]
        fresh = self._cache.open(tar)[0] if isinstance(tar, RemoteShard) else os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        os.close(file)
        self._shards[tar] = fresh, index
        return _pread(fresh, member)


def _open(tar: Path) -> tuple[int, ShardIndex]:
    index = load_index(tar)
    try:
        return STORAGE.call(str(tar), lambda: os.open(tar, os.O_RDONLY | os.O_CLOEXEC)), index
    except OSError as error:
        raise DataError(f"{tar}: cannot open the shard: {error.strerror}") from error


def _pread(file: int, member: Member) -> bytes:
    """Read a member without moving the file's position; a single `pread` may return less than asked for.

    The result is shorter if the file ends before the member, and no memory is taken for the missing bytes.
    """
    wanted = min(member.size, max(0, os.fstat(file).st_size - member.offset))
    data = os.pread(file, wanted, member.offset) if wanted else b""
    while 0 < len(data) < wanted:
        more = os.pread(file, wanted - len(data), member.offset + len(data))
        if not more:
            break
        data += more
    return data
