"""The task of a worker process: make one shard, its index and its part of the report from a chunk of entries."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinygptv_ds.data.prepare.prepare_report import ShardReport, file_state, load_part, save
from tinygptv_ds.data.prepare.stored_images import Encoding, stored_image
from tinygptv_ds.data.sets.common import Entry, PreparedSample, SkipEntry, Skipped
from tinygptv_ds.data.shards.writer import ShardWriter
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.text import render


@dataclass(frozen=True)
class Chunk:
    """The entries of shard `number` of the folder `out`."""

    number: int
    entries: tuple[Entry, ...]
    out: Path
    encoding: Encoding

    @property
    def part(self) -> Path:
        """The file of its part of the report, until all shards are done."""
        return self.out / f".{self.number:05d}.part"

    def digest(self) -> str:
        """Return the hash of everything that decides the shard's content, except the images in files."""
        digest = hashlib.sha256(repr(self.encoding).encode())
        for entry in self.entries:
            digest.update(repr(entry).encode(errors="backslashreplace"))
        return digest.hexdigest()

    def is_made(self) -> bool:
        """Return whether its shard was made before, from the same entries, and is still whole."""
        part = load_part(self.part)
        return part is not None and part.digest == self.digest() and part.is_whole(self.out)


def make_shard(chunk: Chunk, tick: Callable[[int], object]) -> None:
    """Write the shard, its index and, last, its part; without a usable entry there is no shard.

    `tick` is called with the number of entries done.

    Raises DataError if something cannot be written; nothing incomplete has its final name then.
    """
    part = ShardReport(chunk.digest())
    try:
        with ShardWriter(chunk.out, len(chunk.entries), first=chunk.number) as writer:
            for entry in chunk.entries:
                _write(writer, entry, chunk.encoding, part)
                tick(1)
        for tar in writer.tars:
            part.shard, part.state = tar.name, file_state(tar)
        save(part, chunk.part)
    except OSError as error:
        raise DataError(
            f"{chunk.out}: shard {chunk.number:05d} cannot be written: {error.strerror or error}; finished shards are "
            f"kept, the same command resumes from them"
        ) from error


def _write(writer: ShardWriter, entry: Entry, encoding: Encoding, part: ShardReport) -> None:
    if isinstance(entry, Skipped):
        part.skip(entry)
        return
    try:
        members, changes = _members(entry, encoding)
    except SkipEntry as skip:
        where = f"{entry.where}: " if entry.where else ""
        part.skip(Skipped(entry.key, skip.reason, f"{where}{skip}"))
    else:
        writer.write(entry.key, members)
        part.add(entry, changes)


def _members(sample: PreparedSample, encoding: Encoding) -> tuple[dict[str, bytes], set[str]]:
    """Return the sample's files by suffix, and what was changed in its images.

    Raises SkipEntry if an image or the record cannot be used.
    """
    try:
        render(sample.record, len(sample.images), lambda n: n - 1)
    except DataError as error:
        raise SkipEntry("bad_record", str(error)) from error
    if "caption" in sample.record and not sample.images:
        raise SkipEntry("bad_record", "a caption without an image")
    stored = [stored_image(image, encoding) for image in sample.images]
    if len(stored) == 1:
        members = {stored[0].suffix: stored[0].data}
    else:
        members = {f"{number}.{image.suffix}": image.data for number, image in enumerate(stored)}
    members["json"] = json.dumps(sample.record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return members, {change for image in stored for change in image.changes}
