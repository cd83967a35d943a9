"""The entries of a tar, and where their contents are. Names are never used as paths: nothing is extracted."""

import contextlib
import logging
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tinygptv_ds.data.shards.grouping import group, is_complete, split_name
from tinygptv_ds.data.shards.members import Member, is_image
from tinygptv_ds.errors import DataError
from tinygptv_ds.files import check_is_file
from tinygptv_ds.git_lfs import is_lfs_pointer

log = logging.getLogger(__name__)

_BLOCK = 512
_LONGEST_NAME = 1 << 16  # bytes of a long name or a set of extended fields
_FILE, _LONG_NAME, _LONG_LINK, _EXTENDED = b"0\x007", b"L", b"K", b"x"  # types
_NO_DATA = b"123456"  # types of links and devices, which come last
_LINKS = b"12"


class _Header(NamedTuple):
    """What a tar says of one entry: `plain` for a file whose content is in one piece at `offset`.

    `link` is the entry that a link points at, by its name in the tar; empty for others.
    """

    name: str
    plain: bool
    offset: int
    size: int
    link: str = ""


class _DamageError(Exception):
    """From here on the tar cannot be read."""


def scan_tar(tar: Path) -> list[tuple[str, list[Member]]]:
    """Yield (key, members) of every sample of `tar`, in its order (see grouping.py).

    A tar that is cut short gives the complete samples before the cut, with a warning. Links, devices and sparse files
    are no members, except links that are images: they represent the file in the tar that they point to, or, if there is
    none, are members without content, so that their samples are not taken for text alone. Raises DataError if the file
    is no tar at all or cannot be read.
    """
    runs: list[tuple[str, list[Member]]] = []
    cut_key, problem = None, None
    links: list[tuple[list[Member], int, str]] = []  # (members, place in them, name of the target)
    try:
        with tar.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for header in _headers(file.fileno(), size):
                name = split_name(header.name) if header.plain or header.link else None
                if name is None or not (header.plain or is_image(name[1])):
                    continue
                if header.offset + header.size > size and header.plain:
                    cut_key = name[0]
                    raise _DamageError(f"cut short at byte {size}")
                if not runs or runs[-1][0] != name[0]:
                    runs.append((name[0], []))
                members = runs[-1][1]
                if not header.plain:
                    links.append((members, len(members), header.link))
                members.append(Member(name[1], header.offset, header.size))
    except _DamageError as damage:
        problem = str(damage)
    except OSError as error:
        raise DataError(f"{tar}: cannot read the shard: {error.strerror}") from error
    if problem and runs and cut_key in (None, runs[-1][0]):
        lost = runs.pop()  # its other members may be lost
        links = [link for link in links if link[0] is not lost[1]]
    if problem == "bad header at byte 0":
        raise DataError(f"{tar}: {_no_tar(tar)}")
    if links:
        _follow(tar, links)
    samples = group(tar, runs)
    if problem and (len(samples) < len(runs) or cut_key in samples):  # members are not adjacent, so any may be lost
        samples = {key: members for key, members in samples.items() if is_complete(members)}
    if problem:
        log.warning("%s: %s; its %d complete samples are used", tar, problem, len(samples))
    return list(samples.items())


def check_start(tar: Path) -> None:
    """Check by its first block alone that a file is a tar, or holds nothing; `scan_tar` reads the rest.

    Raises:
        DataError: it is none: says what it is, and what to do.
        OSError: it cannot be read, or is a folder, a pipe or a device.
    """
    check_is_file(tar)
    with tar.open("rb", buffering=0) as file:
        start = file.read(_BLOCK)
    try:
        if any(start):
            _checked_length(start.ljust(_BLOCK, b"\0"))
    except ValueError:
        raise DataError(f"{tar}: {_no_tar(tar)}") from None


def _follow(tar: Path, links: list[tuple[list[Member], int, str]]) -> None:
    """Resolve links to the files that they point to; without one, they stay members without content."""
    by_path: dict[str, tuple[int, int]] = {}
    with tar.open("rb", buffering=0) as file, contextlib.suppress(_DamageError):
        size = os.fstat(file.fileno()).st_size
        for header in _headers(file.fileno(), size):
            if header.plain and header.offset + header.size <= size:
                by_path[posixpath.normpath(header.name)] = header.offset, header.size
    for members, place, target in links:
        members[place] = Member(members[place].suffix, *by_path.get(target, (0, 0)))


def _no_tar(tar: Path) -> str:
    """Say what a file is that is no tar, and what to do."""
    with tar.open("rb") as file:
        start = file.read(_BLOCK)
    packed = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"(\xb5/\xfd": "unzstd"}
    for magic, command in packed.items():
        if start.startswith(magic):
            return (
                f"no uncompressed tar file but a compressed one, in which no sample can be found; run {command} on it"
            )
    if start.startswith(b"PK\x03\x04"):
        return "no uncompressed tar file but a ZIP archive; unpack it, then: tar --sort=name -cf SHARD.tar FOLDER"
    if is_lfs_pointer(start):
        return "no uncompressed tar file but a Git LFS pointer; fetch the file that it points to: git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "no uncompressed tar file but a web page, e.g. of a login or an error, saved in place of the file; "
            "check the URL, and fetch it again"
        )
    return "no uncompressed tar file (bad header at byte 0); is it the right file? If so, fetch it again"


def bad_end(tar: Path, after: int) -> str | None:
    """Return what is wrong with `tar` from byte `after` on, where one of its members ends; None if nothing is.

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
    """Yield every entry of a tar of `size` bytes from byte `at` on, by POSIX's and GNU's rules.

    Not by the standard library's tarfile: it believes what a header claims, to the point of endless loops, and takes
    several times as long. Raises _DamageError unless the tar ends as it should.
    """
    name: str | None = None
    link: str | None = None
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
            if kind in (_LONG_NAME, _LONG_LINK, _EXTENDED):
                content = _content(file, start, length)
                if kind == _LONG_NAME:
                    name = _text(content)
                elif kind == _LONG_LINK:
                    link = _text(content)
                else:
                    extended |= _extended_fields(content)
            else:
                if b"size" in extended:
                    length = _plain_int(extended[b"size"], 10)
                if kind == b"S":  # GNU's sparse files have further header blocks
                    raise ValueError
                path = _text(extended[b"path"]) if b"path" in extended else name or _short_name(block)
                plain = kind in _FILE and not any(key.startswith(b"GNU.sparse") for key in extended)
                if kind in _LINKS:
                    target = _text(extended[b"linkpath"]) if b"linkpath" in extended else link or _text(block[157:257])
                    # a hard link names an entry of the tar, a symbolic one a path from its own folder
                    named = target if kind == b"1" else posixpath.join(posixpath.dirname(path), target)
                    yield _Header(path, False, start, 0, posixpath.normpath(named))
                else:
                    yield _Header(path, plain, start, length)
                name, link, extended = None, None, {}
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
    """Read a number in octal digits, or in base 256 after a byte of 128."""
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
