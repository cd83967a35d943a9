"""WebDataset tars with a small index beside each, so that any sample of any shard is one read away.

A sample's members stand next to each other in the tar and share a key: the member's path up to the first dot of its
base name. The rest of the name, lower-cased, is the suffix (``json``, ``jpg``, ``0.jpg``). Member names are only ever
names: nothing is extracted.
"""

import contextlib
import errno
import glob
import hashlib
import logging
import multiprocessing
import os
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import braceexpand
import numpy as np
from tqdm import tqdm

from tinygptv_ds.errors import DataError

log = logging.getLogger(__name__)

# magic, size and mtime (ns) of the tar it describes, samples, members, bytes of the body, crc32 of the body
_HEADER = struct.Struct("<8sQqIIQI")
_MAGIC = b"TGVidx1\n"
_MANY = 32  # shards to index before it pays to start processes


class Member(NamedTuple):
    """One file inside a tar. `offset` and `size` are in bytes; the content lies there as it is."""

    suffix: str
    offset: int
    size: int


class ShardIndex:
    """Where everything lies in one tar: per sample its key and members.

    Held as flat arrays (about 20 bytes a member), since a shard of 10,000 samples has 30,000 members.
    """

    def __init__(self, samples: Sequence[tuple[str, Sequence[Member]]]) -> None:
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

    def key(self, index: int) -> str:
        """The key of sample `index`, 0 <= index < len(self)."""
        return self._keys[self._key_ends[index] : self._key_ends[index + 1]].decode()

    def members(self, index: int) -> tuple[Member, ...]:
        """The members of sample `index` in the order of the tar."""
        rows = range(int(self._member_ends[index]), int(self._member_ends[index + 1]))
        return tuple(
            Member(self._suffixes[self._suffix_of[i]], int(self._offsets[i]), int(self._sizes[i])) for i in rows
        )

    def to_bytes(self, tar_state: tuple[int, int]) -> bytes:
        """The index file: a header that alone tells the count, then the arrays. `tar_state` is (size, mtime in ns)."""
        suffixes = "\n".join(self._suffixes).encode()
        arrays = (self._key_ends, self._member_ends, self._suffix_of, self._offsets, self._sizes)
        body = struct.pack("<II", len(suffixes), len(self._keys)) + suffixes + self._keys
        body += b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
        return _HEADER.pack(_MAGIC, *tar_state, len(self), len(self._offsets), len(body), zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`. Raises ValueError if the file is torn or altered."""
        _, _, _, samples, members, length, crc = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        if len(body) != length or zlib.crc32(body) != crc:
            raise ValueError("torn index file")
        suffix_bytes, key_bytes = struct.unpack_from("<II", body)
        start = 8 + suffix_bytes + key_bytes
        self = cls.__new__(cls)
        self._suffixes = body[8 : 8 + suffix_bytes].decode().split("\n")
        self._keys = body[8 + suffix_bytes : start]
        arrays = []
        for dtype, count in (("<u4", samples + 1), ("<u4", samples + 1), ("<u4", members), ("<u8", members)):
            arrays.append(np.frombuffer(body, dtype, count, start))
            start += arrays[-1].nbytes
        self._key_ends, self._member_ends, self._suffix_of, self._offsets = arrays
        self._sizes = np.frombuffer(body, "<u8", members, start)
        return self


# ---- which tars ------------------------------------------------------------------------------------------------------


def expand_shards(pattern: str | list[str], root: Path | None = None) -> list[Path]:
    """The tars that `pattern` names: braces (``{00000..01255}.tar``), wildcards, a folder (its ``*.tar``), or a list.

    Relative patterns are taken from `root`. The order is that of the braces and the list, sorted within wildcards and
    folders. Raises DataError if a named file does not exist, a wildcard or folder gives none, or a file comes twice.
    """
    found: list[Path] = []
    for entry in [pattern] if isinstance(pattern, str) else pattern:
        found += _expand(entry, root)
    twice = next((path for path in found if found.count(path) > 1), None) if len(set(found)) < len(found) else None
    if twice:
        raise DataError(f"shards: {twice} is listed more than once; list every shard once")
    return found


def _expand(pattern: str, root: Path | None) -> list[Path]:
    if "pipe:" in pattern or "://" in pattern:
        raise DataError(f"shards: {pattern!r} is no file name; copy or mount the shards and name their files")
    try:
        named = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise DataError(f"shards: unbalanced braces in {pattern!r}") from None
    found, missing = [], []
    for name in named:
        path = (root or Path()) / Path(name).expanduser()
        if path.is_dir():
            tars = sorted(path.glob("*.tar"))
        elif path.is_file():
            tars = [path]
        elif glob.has_magic(name):
            tars = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 (the pattern may be absolute)
        else:
            tars = []
        found += tars
        if not tars:
            missing.append(path)
    if missing:
        what = f"holds no *.tar: {missing[0]}" if missing[0].is_dir() else f"not found: {missing[0]}"
        count = f" (and {len(missing) - 1} more of {len(named)} named)" if len(missing) > 1 else ""
        raise DataError(f"shards {pattern!r}: {what}{count}; check the path, or narrow the pattern to what is there")
    return found


# ---- reading the index -----------------------------------------------------------------------------------------------


def sample_count(tar: Path) -> int:
    """Number of samples in `tar`, from the index's first bytes; builds the index if there is none."""
    count = _stored_count(tar)
    return len(build_index(tar)) if count is None else count


def sample_counts(tars: Sequence[Path], workers: int | None = None) -> list[int]:
    """`sample_count` of every tar. Missing indexes are built first (about a second per 10,000 samples), with a
    progress bar and, from some number on, in `workers` processes (default: one per core).
    """
    missing = [tar for tar in tars if _stored_count(tar) is None]
    if len(missing) > _MANY:
        # spawn: the caller may have threads or a device open
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in tqdm(pool.map(sample_count, missing), "indexing shards", len(missing), unit="shard"):
                pass
    return [sample_count(tar) for tar in tars]


def _stored_count(tar: Path) -> int | None:
    headers = (_read_header(path, _tar_state(tar)) for path in _index_paths(tar))
    return next((header[3] for header in headers if header is not None), None)


def load_index(tar: Path) -> ShardIndex:
    """The index of `tar`, built first if it is missing, torn or older than the tar."""
    for path in _index_paths(tar):
        if _read_header(path, _tar_state(tar)) is not None:
            with contextlib.suppress(ValueError, OSError):
                return ShardIndex.from_bytes(path.read_bytes())
    return build_index(tar)


def build_index(tar: Path) -> ShardIndex:
    """Scan `tar` and store its index beside it, or in the cache folder where that cannot be written.

    A tar that is cut short gives the complete samples before the cut, with a warning. Raises DataError if the file is
    no tar at all or the index can be stored nowhere.
    """
    state = _tar_state(tar)
    index = ShardIndex(_scan(tar))
    data = index.to_bytes(state)
    beside, cached = _index_paths(tar)
    try:
        _write_atomically(beside, data)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DataError(f"{beside}: cannot write the shard index: {error.strerror}") from error
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(cached, data)
        except OSError as error:
            raise DataError(
                f"{tar}: its folder is read-only and so is {cached.parent} ({error.strerror}); "
                f"set XDG_CACHE_HOME to a writable folder for the shard index"
            ) from error
    return index


def _tar_state(tar: Path) -> tuple[int, int]:
    try:
        stat = tar.stat()
    except OSError as error:
        raise DataError(f"{tar}: cannot open the shard: {error.strerror}") from error
    return stat.st_size, stat.st_mtime_ns


def _index_paths(tar: Path) -> tuple[Path, Path]:
    """Where the index may lie: beside the tar, or in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinygptv_ds" / "index"
    name = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:32]
    return tar.with_name(f"{tar.name}.idx"), cache / f"{name}.idx"


def _read_header(path: Path, tar_state: tuple[int, int]) -> tuple | None:
    """The header, or None if there is none or it describes another state of the tar."""
    try:
        with path.open("rb") as file:
            header = _HEADER.unpack(file.read(_HEADER.size))
    except (OSError, struct.error):
        return None
    return header if header[:3] == (_MAGIC, *tar_state) else None


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ---- scanning a tar --------------------------------------------------------------------------------------------------


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name, or None for a name that belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot and suffix else None


def _scan(tar: Path) -> list[tuple[str, list[Member]]]:
    samples: list[tuple[str, list[Member]]] = []
    with tar.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        cut_key, problem = None, "empty file"
        if size:
            with _open_tar(tar, file) as archive:
                for key, member in _members(archive):
                    if member.offset + member.size > size:
                        cut_key = key
                        break
                    if not samples or samples[-1][0] != key:
                        samples.append((key, []))
                    samples[-1][1].append(member)
                problem = _bad_end(file, archive.offset, size)
    if problem and samples and cut_key in (None, samples[-1][0]):
        samples.pop()  # its other members may be lost
    if problem:
        log.warning("%s: %s; its %d complete samples are used", tar, problem, len(samples))
    return _without_duplicates(tar, samples)


def _open_tar(tar: Path, file: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", errors="replace")
    except tarfile.ReadError as error:
        raise DataError(f"{tar}: no uncompressed tar file ({error}); fetch or unpack the shard again") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, Member]]:
    """(key, member) of every plain file that belongs to a sample, up to the end or the first unreadable header."""
    while True:
        try:
            info = archive.next()
        except (tarfile.ReadError, EOFError):
            return
        if info is None:
            return
        archive.members = []  # tarfile would keep them all
        name = split_name(info.name) if info.isreg() else None
        if name:
            yield name[0], Member(name[1], info.offset_data, info.size)


def _bad_end(file: BinaryIO, end: int, size: int) -> str | None:
    """What is wrong at `end`, where the next header was to be, or None if the tar ends there as it should."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return f"cut short at byte {size}"
    return f"bad header at byte {end}" if any(block) else None


def _without_duplicates(tar: Path, samples: list[tuple[str, list[Member]]]) -> list[tuple[str, list[Member]]]:
    """Keep the first of samples with the same key, and of members with the same name; warn about the others."""
    kept: dict[str, list[Member]] = {}
    dropped = []
    for key, members in samples:
        if key in kept:
            dropped.append(key)
            continue
        kept[key] = list({member.suffix: member for member in reversed(members)}.values())[::-1]
        if len(kept[key]) < len(members):
            dropped.append(key)
    if dropped:
        log.warning("%s: %d keys occur more than once, such as %s; the first is used", tar, len(dropped), dropped[0])
    return list(kept.items())


# ---- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Write samples to ``00000.tar``, ``00001.tar``, ... with an index beside each.

    The bytes depend on nothing but the samples. A shard carries its final name only when it is complete; leaving the
    ``with`` block by an exception removes the one under way. `tars` lists what has been completed.
    """

    def __init__(self, out_dir: Path, samples_per_shard: int = 10_000) -> None:
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.tars: list[Path] = []
        self._out_dir = out_dir
        self._samples_per_shard = samples_per_shard
        self._open: BinaryIO | None = None
        self._written = 0

    def __enter__(self) -> Self:
        self._out_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        elif self._open is not None:
            with contextlib.suppress(OSError):  # such as the full disk that brought us here
                self._archive.close()
                self._open.close()
            self._temporary().unlink(missing_ok=True)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: `members` by suffix. Keys must be unique and hold no dot in their last part."""
        if self._open is None:
            from webdataset import TarWriter  # imports torch

            self._open = self._temporary().open("wb")
            self._archive = TarWriter(self._open, encoder=False, user="", group="", mtime=0)
        self._archive.write({"__key__": key, **members})
        self._written += 1
        if self._written == self._samples_per_shard:
            self._complete()

    def finish(self) -> None:
        """Complete the last shard."""
        if self._open is not None:
            self._complete()

    def _name(self) -> str:
        return f"{len(self.tars):05d}.tar"

    def _temporary(self) -> Path:
        return self._out_dir / f".{self._name()}.tmp"

    def _complete(self) -> None:
        self._archive.close()
        self._open.flush()
        os.fsync(self._open.fileno())
        self._open.close()
        tar = self._out_dir / self._name()
        self._temporary().replace(tar)
        build_index(tar)
        self.tars.append(tar)
        self._open, self._written = None, 0
