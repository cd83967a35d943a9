"""The members of a tar: which belong to which sample, and where they lie.

A sample's members stand next to each other in the tar and share a key: the member's path up to the first dot of its
base name. The rest of the name, lower-cased, is the suffix (``json``, ``jpg``, ``0.jpg``). Member names are only ever
names: nothing is extracted.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tinygptv_ds.errors import DataError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"])
FEATURE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # suffixes of an image's features in its place, and of one value
VISION_SUFFIXES = IMAGE_SUFFIXES | FEATURE_BYTES.keys()
SKIPPED = "skipped.json"  # in shards of features: why the sample cannot be used
_BLOCK = 512
_LONGEST_NAME = 1 << 16  # bytes of a long name or a set of extended fields
_FILE, _LONG_NAME, _EXTENDED, _NO_DATA = b"0\x007", b"L", b"x", b"123456"  # types; those of links and devices come last


class Member(NamedTuple):
    """One file inside a tar. `offset` and `size` are in bytes; the content lies there as it is."""

    suffix: str
    offset: int
    size: int


class _Header(NamedTuple):
    """What a tar says of one entry: `plain` for a file whose content lies in one piece at `offset`."""

    name: str
    plain: bool
    offset: int
    size: int


class _DamageError(Exception):
    """From here on the tar cannot be read."""


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name, or None for a name that belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    usual = stem and dot and suffix and "\n" not in suffix
    return (folder + slash + stem, suffix.lower()) if usual else None


def scan_tar(tar: Path) -> list[tuple[str, list[Member]]]:
    """(key, members) of every sample of `tar`, in its order.

    A tar that is cut short gives the complete samples before the cut, with a warning; of keys and members that occur
    twice the first counts. Links, devices and sparse files are no members. Raises DataError if the file is no tar at
    all or cannot be read.
    """
    samples: list[tuple[str, list[Member]]] = []
    cut_key, problem = None, None
    try:
        with tar.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for header in _headers(file.fileno(), size):
                name = split_name(header.name) if header.plain else None
                if name is None:
                    continue
                if header.offset + header.size > size:
                    cut_key = name[0]
                    raise _DamageError(f"cut short at byte {size}")
                if not samples or samples[-1][0] != name[0]:
                    samples.append((name[0], []))
                samples[-1][1].append(Member(name[1], header.offset, header.size))
    except _DamageError as damage:
        problem = str(damage)
    except OSError as error:
        raise DataError(f"{tar}: cannot read the shard: {error.strerror}") from error
    if problem and samples and cut_key in (None, samples[-1][0]):
        samples.pop()  # its other members may be lost
    if problem == "bad header at byte 0":
        raise DataError(f"{tar}: no uncompressed tar file ({problem}); fetch or unpack the shard again")
    if problem:
        log.warning("%s: %s; its %d complete samples are used", tar, problem, len(samples))
    return _without_duplicates(tar, samples)


def bad_end(tar: Path, after: int) -> str | None:
    """What is wrong with `tar` from byte `after` on, where one of its members ends; None: it ends as it should.

    What `scan_tar` warns of when an index is built can be reported again from the index, without a new scan.
    """
    with tar.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = -(-after // _BLOCK) * _BLOCK
        if start >= size:
            return f"cut short at byte {size}"
        try:
            ends = [header.offset + header.size for header in _headers(file.fileno(), size, start)]
        except _DamageError as damage:
            return str(damage)
    return f"cut short at byte {size}" if any(end > size for end in ends) else None


def _headers(file: int, size: int, at: int = 0) -> Iterator[_Header]:
    """Every entry of a tar of `size` bytes from byte `at` on, by POSIX's and GNU's rules.

    Not by the standard library's tarfile: it believes what a header claims, to the point of endless loops, and takes
    several times as long. Raises _DamageError unless the tar ends as it should.
    """
    name: str | None = None
    extended: dict[bytes, bytes] = {}
    if size == 0:
        raise _DamageError("empty file")
    while True:
        block = os.pread(file, _BLOCK, at) if at < size else b""
        if len(block) < _BLOCK:
            raise _DamageError(f"cut short at byte {size}" if at else "bad header at byte 0")
        if not any(block):
            return
        try:
            length, kind, start = _checked_length(block), block[156:157], at + _BLOCK
            if kind in (_LONG_NAME, _EXTENDED):
                content = _content(file, start, length)
                if kind == _LONG_NAME:
                    name = _text(content)
                else:
                    extended |= _extended_fields(content)
            else:
                if b"size" in extended:
                    length = _plain_int(extended[b"size"], 10)
                if kind == b"S":  # GNU's sparse files go on with blocks of their own
                    raise ValueError
                path = _text(extended[b"path"]) if b"path" in extended else name or _short_name(block)
                plain = kind in _FILE and not any(key.startswith(b"GNU.sparse") for key in extended)
                yield _Header(path, plain, start, length)
                name, extended = None, {}
        except ValueError:
            raise _DamageError(f"bad header at byte {at}") from None
        at = start + (0 if kind in _NO_DATA else -(-length // _BLOCK) * _BLOCK)


def _checked_length(block: bytes) -> int:
    """Bytes of the content that follows a header. Raises ValueError if this is no header."""
    others = block[:148] + block[156:]
    checksum = _number(block[148:156])
    if checksum != 256 + sum(others) and checksum != 256 + sum(byte - (byte & 128) * 2 for byte in others):
        raise ValueError("checksum")  # old tars sum signed bytes
    return _number(block[124:136])


def _number(field: bytes) -> int:
    """A number in octal digits, or in base 256 behind a byte of 128."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _plain_int(field.partition(b"\0")[0].strip() or b"0", 8)


def _plain_int(digits: bytes, base: int) -> int:
    if not digits.isdigit():
        raise ValueError("no digits")
    return int(digits, base)


def _content(file: int, start: int, length: int) -> bytes:
    content = os.pread(file, length, start) if length <= _LONGEST_NAME else b""
    if len(content) < length:
        raise ValueError("no such name")
    return content


def _extended_fields(content: bytes) -> dict[bytes, bytes]:
    """POSIX's extended header: lines of ``LENGTH KEY=VALUE``, where the length is that of the whole line."""
    fields, at = {}, 0
    while at < len(content):
        digits = content[at : at + 8].partition(b" ")[0]
        line = content[at : at + _plain_int(digits, 10)]
        key, equals, value = line[len(digits) + 1 : -1].partition(b"=")
        if not equals or line[-1:] != b"\n":
            raise ValueError("extended header")
        fields[key] = value
        at += len(line)
    return fields


def _short_name(block: bytes) -> str:
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    name = _text(block[:100])
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="replace")


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
