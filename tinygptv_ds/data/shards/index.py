"""A small index next to each tar, so that any sample of any shard can be read at once."""

import contextlib
import errno
import hashlib
import mmap
import multiprocessing
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from tinygptv_ds.data.shards.members import CAPTION, RECORD, SKIPPED, TEXTS, Member, begins_as_image, is_image
from tinygptv_ds.data.shards.records import holds_sample, parse_record, plain_record, read_record
from tinygptv_ds.data.shards.tar import scan_tar
from tinygptv_ds.errors import DataError
from tinygptv_ds.files import cache_home, check_is_file, write_atomically
from tinygptv_ds.processing.lengths import text_lengths
from tinygptv_ds.retry import STORAGE

# magic, size and mtime (ns) of the tar it describes, samples, members, bytes of the body, crc32 of the body
_HEADER = struct.Struct("<8sQqIIQI")
_HEADER_CRC = struct.Struct("<I")  # follows it
HEADER_BYTES = _HEADER.size + _HEADER_CRC.size
# The first one is that of indexes whose shards can only be read in one way: see `_has_one_reading`.
_PLAIN_MAGIC, _MAGIC = b"TGVidx2\n", b"TGVidx3\n"
_USUAL = re.compile(r"([0-9]+\.)?(jpg|jpeg|png|webp|gif|bmp|tif|tiff|ppm|fp32|bf16|fp16)")
_LONGEST = 65_535  # of what a length can count
_MANY = 32  # shards to index before it pays to start processes


class IndexHeader(NamedTuple):
    """The first `HEADER_BYTES` of an index file: which tar it describes (size, time in ns), and its counts."""

    tar_size: int
    tar_mtime: int
    samples: int
    members: int
    body_bytes: int
    body_crc: int

    @property
    def has_usual_counts(self) -> bool:
        """Whether samples have as many members as an image with its record has, or a few more."""
        return 2 * self.samples <= self.members <= 8 * self.samples


def header_of(start: bytes) -> IndexHeader | None:
    """Return the header at the start of an index file, or None if it is none or damaged."""
    if len(start) < HEADER_BYTES or _HEADER_CRC.unpack_from(start, _HEADER.size)[0] != zlib.crc32(
        start[: _HEADER.size]
    ):
        return None
    magic, *fields = _HEADER.unpack_from(start)
    header = IndexHeader(*fields)
    known = magic == _MAGIC or (magic == _PLAIN_MAGIC and header.has_usual_counts)
    return header if known else None


class ShardIndex:
    """The contents of one tar: the key, the members and the lengths of every sample.

    Held as flat arrays (about 20 bytes a member), since a shard of 10,000 samples has 30,000 members.

    Attributes:
        lengths: uint16 `[samples, 3]`: images, and estimated tokens of the first question and of what follows
            (processing/lengths.py). What batches are balanced by; zeros where unknown.
    """

    def __init__(self, samples: Sequence[tuple[str, Sequence[Member]]], lengths: np.ndarray | None = None) -> None:
        self.lengths = np.zeros((len(samples), 3), dtype=np.uint16) if lengths is None else lengths
        members = [member for _, sample in samples for member in sample]
        self._suffixes = sorted({member.suffix for member in members})
        number = {suffix: i for i, suffix in enumerate(self._suffixes)}
        keys = [key.encode() for key, _ in samples]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([0, *map(len, keys)], dtype=np.uint32)
        self._member_ends = np.cumsum([0, *(len(sample) for _, sample in samples)], dtype=np.uint32)
        self._offsets = np.array([member.offset for member in members], dtype=np.uint64)
        self._sizes = np.array([member.size for member in members], dtype=np.uint64)
        self._suffix_of = np.array([number[member.suffix] for member in members], dtype=np.uint32)

    def __len__(self) -> int:
        return len(self._key_ends) - 1

    @property
    def suffixes(self) -> list[str]:
        """The suffixes of all members, each once."""
        return self._suffixes

    def key(self, index: int) -> str:
        """Return the key of sample `index`, 0 <= index < len(self)."""
        return self._keys[self._key_ends[index] : self._key_ends[index + 1]].decode(errors="replace")

    def members(self, index: int) -> tuple[Member, ...]:
        """Return the members of sample `index` in the order of the tar."""
        rows = range(int(self._member_ends[index]), int(self._member_ends[index + 1]))
        return tuple(
            Member(self._suffixes[self._suffix_of[i]], int(self._offsets[i]), int(self._sizes[i])) for i in rows
        )

    def to_bytes(self, tar_state: tuple[int, int]) -> bytes:
        """Return the index file: a header, which has the count, and the arrays. `tar_state` is (size, mtime in ns)."""
        suffixes = "\n".join(self._suffixes).encode()
        arrays = (self._key_ends, self._member_ends, self._suffix_of, self._offsets, self._sizes, self.lengths)
        body = struct.pack("<II", len(suffixes), len(self._keys)) + suffixes + self._keys
        body += b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
        counts = len(self), len(self._offsets), len(body), zlib.crc32(body)
        plain = IndexHeader(*tar_state, *counts).has_usual_counts and self._has_one_reading()
        header = _HEADER.pack(_PLAIN_MAGIC if plain else _MAGIC, *tar_state, *counts)
        return header + _HEADER_CRC.pack(zlib.crc32(header)) + body

    @classmethod
    def from_bytes(cls, data: bytes | mmap.mmap) -> Self:
        """Read what `to_bytes` returns, without a copy. Raises ValueError if it is torn or contradicts itself."""
        header, body = header_of(data[:HEADER_BYTES]), memoryview(data)[HEADER_BYTES:]
        if header is None or not 8 <= len(body) == header.body_bytes or zlib.crc32(body) != header.body_crc:
            raise ValueError("torn index file")
        samples, members = header.samples, header.members
        suffix_bytes, key_bytes = struct.unpack_from("<II", body)
        start = 8 + suffix_bytes + key_bytes
        self = cls.__new__(cls)
        self._suffixes = bytes(body[8 : 8 + suffix_bytes]).decode().split("\n")
        self._keys = bytes(body[8 + suffix_bytes : start])
        arrays = []
        for dtype, count in (("<u4", samples + 1), ("<u4", samples + 1), ("<u4", members), ("<u8", members)):
            arrays.append(np.frombuffer(body, dtype, count, start))
            start += arrays[-1].nbytes
        self._key_ends, self._member_ends, self._suffix_of, self._offsets = arrays
        self._sizes = np.frombuffer(body, "<u8", members, start)
        self.lengths = np.frombuffer(body, "<u2", 3 * samples, start + self._sizes.nbytes).reshape(samples, 3)
        self._check()
        if data[:8] == _PLAIN_MAGIC and not self._has_one_reading():
            raise ValueError("index file of a version that did not join the members of a sample")
        return self

    def _has_one_reading(self) -> bool:
        """Return whether every sample has a record and an image under their usual names.

        Indexes of version 2 were written by a reader that lost members of a sample that were not adjacent, cut keys at
        dots, and knew fewer names of images. They are trusted where none of this can have happened, so that those of
        large data sets stay as they are; all others have version 3.
        """
        if any(not _USUAL.fullmatch(suffix) for suffix in self._suffixes if is_image(suffix) or "." in suffix):
            return False
        if not self.lengths[:, 1:].any() and any(suffix in TEXTS for suffix in self._suffixes):
            return False
        kinds = ([suffix == RECORD for suffix in self._suffixes], [is_image(suffix) for suffix in self._suffixes])
        starts = self._member_ends[:-1]
        if np.any(starts == self._member_ends[1:]):
            return False
        has = (np.logical_or.reduceat(np.array(kind, dtype=bool)[self._suffix_of], starts) for kind in kinds)
        return not len(starts) or all(map(np.all, has))

    def _check(self) -> None:
        """Check an index, which may come from elsewhere and whose checksum alone does not make it consistent."""
        for ends, total in ((self._key_ends, len(self._keys)), (self._member_ends, len(self._offsets))):
            if ends[0] != 0 or ends[-1] != total or np.any(ends[1:] < ends[:-1]):
                raise ValueError("inconsistent index file")
        if np.any(self._suffix_of >= len(self._suffixes)):
            raise ValueError("inconsistent index file")


def sample_count(tar: Path) -> int:
    """Number of samples in `tar`, from the index's first bytes; builds the index if there is none."""

    def found() -> int:
        count = stored_count(tar)
        return len(build_index(tar)) if count is None else count

    return STORAGE.call(str(tar), found)


def sample_counts(tars: Sequence[Path], workers: int | None = None) -> list[int]:
    """Return `sample_count` of every tar. Missing indexes are built first (about a second per 10,000 samples), with a
    progress bar and, from some number on, in `workers` processes (default: one per core).
    """
    counts = [stored_count(tar) for tar in tars]
    missing = [tar for tar, count in zip(tars, counts, strict=True) if count is None]
    if len(missing) > _MANY:
        # spawn: the caller may have threads or a device open
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in tqdm(pool.map(sample_count, missing), "indexing shards", len(missing), unit="shard"):
                pass
    return [sample_count(tar) if count is None else count for tar, count in zip(tars, counts, strict=True)]


def stored_count(tar: Path) -> int | None:
    """Number of samples in `tar`, if there is an index of it as it is now."""
    state = _tar_state(tar)
    headers = (_read_header(path, state) for path in _index_paths(tar))
    return next((header.samples for header in headers if header is not None), None)


def load_index(tar: Path) -> ShardIndex:
    """Return the index of `tar`, built first if it is missing, torn or older than the tar."""
    return STORAGE.call(str(tar), lambda: _load_index(tar))


def _load_index(tar: Path) -> ShardIndex:
    for path in _index_paths(tar):
        if _read_header(path, _tar_state(tar)) is not None:
            with contextlib.suppress(ValueError, OSError):
                return ShardIndex.from_bytes(_mapped(path))
    return build_index(tar)


def _mapped(path: Path) -> mmap.mmap:
    """Map a file's content, of which all processes of a node share one copy in memory."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def build_index(tar: Path) -> ShardIndex:
    """Scan `tar` and store its index next to it, or in the cache folder where that cannot be written.

    A tar that is cut short gives the complete samples before the cut, with a warning. Raises DataError if the file is
    no tar at all or the index can be stored nowhere.
    """
    state = _tar_state(tar)
    samples = _with_captions(tar, scan_tar(tar))
    index = ShardIndex(samples, measure(tar, [members for _, members in samples]))
    data = index.to_bytes(state)
    adjacent, cached = _index_paths(tar)
    try:
        write_atomically(adjacent, data)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"{adjacent}: cannot write the shard index: {error.strerror}") from error
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, data)
        except OSError as error:
            raise DataError(
                f"{tar}: its folder is read-only and so is {cached.parent} ({error.strerror}); "
                f"set XDG_CACHE_HOME to a writable folder for the shard index"
            ) from error
    return index


def _with_captions(tar: Path, samples: list[tuple[str, list[Member]]]) -> list[tuple[str, list[Member]]]:
    """Name text files as the captions that they are in shards without a record that holds a sample.

    Where records do, as img2dataset writes them, the text files are copies, and a sample without a record has lost it.
    """
    texts = {member.suffix for _, members in samples for member in members} & set(TEXTS)
    if not texts or _any_holds_sample(tar, samples):
        return samples
    text = next(suffix for suffix in TEXTS if suffix in texts)

    def named(members: list[Member]) -> list[Member]:
        if not any(is_image(member.suffix) for member in members):
            return members
        return [member._replace(suffix=CAPTION) if member.suffix == text else member for member in members]

    return [(key, named(members)) for key, members in samples]


def _any_holds_sample(tar: Path, samples: list[tuple[str, list[Member]]]) -> bool:
    with tar.open("rb") as file:
        for member in (member for _, members in samples for member in members if member.suffix == RECORD):
            with contextlib.suppress(DataError, OSError):
                if holds_sample(parse_record(_content(file, member), "")):
                    return True
    return False


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def measure(tar: Path, samples: Sequence[Sequence[Member]]) -> np.ndarray:
    """Return `ShardIndex.lengths` of the samples with these members; a record that cannot be read counts as empty."""
    lengths = np.zeros((len(samples), 3), dtype=np.uint16)
    with tar.open("rb") as file:
        content = partial(_content, file)
        for number, members in enumerate(samples):
            images = sum(is_image(member.suffix) for member in members)
            record: dict[str, Any] = {}
            noted: Any = 0
            with contextlib.suppress(DataError, OSError):
                # empty features keep the number of images, so that steps are distributed as from images
                if not images and any(member.suffix == SKIPPED for member in members):
                    note = next(member for member in members if member.suffix == SKIPPED)
                    noted = parse_record(content(note), "").get("images", 0)
                images = images or sum(begins_as_image(member, content) for member in members)
                record = read_record(members, content, "")
                record = plain_record(record, images or 1, "")
            found = (images or noted, *text_lengths(record))
            lengths[number] = [min(max(int(n), 0), _LONGEST) if isinstance(n, int) else 0 for n in found]
    return lengths


def _tar_state(tar: Path) -> tuple[int, int]:
    try:
        check_is_file(tar)
        stat = tar.stat()
    except OSError as error:
        raise DataError(f"{tar}: cannot open the shard: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _index_paths(tar: Path) -> Iterator[Path]:
    """Return where the index may be: next to the tar, or in the user's cache."""
    yield tar.with_name(f"{tar.name}.idx")
    name = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:32]
    yield cache_home() / "index" / f"{name}.idx"


def _read_header(path: Path, tar_state: tuple[int, int]) -> IndexHeader | None:
    """Return the header, or None if there is none or it describes another state of the tar."""
    try:
        with path.open("rb") as file:
            header = header_of(file.read(HEADER_BYTES))
    except OSError:
        return None
    return header if header is not None and header[:2] == tar_state else None
