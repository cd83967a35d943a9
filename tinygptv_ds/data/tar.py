"""The members of a tar: which belong to which sample, and where they lie.

A sample's members stand next to each other in the tar and share a key: the member's path up to the first dot of its
base name. The rest of the name, lower-cased, is the suffix (``json``, ``jpg``, ``0.jpg``). Member names are only ever
names: nothing is extracted.
"""

import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tinygptv_ds.errors import DataError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"])


class Member(NamedTuple):
    """One file inside a tar. `offset` and `size` are in bytes; the content lies there as it is."""

    suffix: str
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name, or None for a name that belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot and suffix else None


def scan_tar(tar: Path) -> list[tuple[str, list[Member]]]:
    """(key, members) of every sample of `tar`, in its order.

    A tar that is cut short gives the complete samples before the cut, with a warning; of keys and members that occur
    twice the first counts. Raises DataError if the file is no tar at all.
    """
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


def bad_end(tar: Path, after: int) -> str | None:
    """What is wrong with `tar` from byte `after` on, where one of its members ends; None: it ends as it should.

    What `scan_tar` warns of when an index is built can so be told again from the index, without a new scan.
    """
    with tar.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = -(-after // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if start >= size:
            return f"cut short at byte {size}"
        file.seek(start)
        with _open_tar(tar, file) as archive:
            if any(member.offset + member.size > size for _, member in _members(archive)):
                return f"cut short at byte {size}"
            return _bad_end(file, archive.offset, size)
