"""Checks of a dataset's samples as training reads them: record, text and images. What fails is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tinygptv_ds.config.data_section import DatasetSection
from tinygptv_ds.data.loader.background import background_of
from tinygptv_ds.data.loader.sample import render_sample
from tinygptv_ds.data.process_pool import WorkerPool
from tinygptv_ds.data.shards.cache import ShardCache
from tinygptv_ds.data.shards.index import load_index
from tinygptv_ds.data.shards.reader import RawSample, ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.data.shards.remote import Shard
from tinygptv_ds.data.shards.tar import bad_end
from tinygptv_ds.data.stream.mixture import SampleRef, sample_rng
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.image import Color, ImageTraits, open_image, read_traits
from tinygptv_ds.processing.image_limits import ImageError
from tinygptv_ds.processing.text import Rendered

LISTED = 10  # broken samples that are named; all are counted
_CHUNK = 1_000  # samples that a process takes at once


@dataclass(frozen=True)
class Broken:
    """A sample that training would leave out: where it is, one word for counting, and the whole message."""

    shard: str
    key: str
    reason: str
    message: str


@dataclass
class Tally:
    """Counts over the samples that were checked.

    Attributes:
        looked_at: samples.
        unusable: samples that drop out of training, by reason.
        with_images: samples that train with an image.
        text_only: samples that train without one.
        images: images that the records ask for, as far as known.
        missing_images: samples whose image is not in the shard.
        corrupt_images: images that cannot be decoded.
        image_notes: images that are not read as they are stored, by what is special about them.
        longest_text: characters of all turns of the longest sample.
        longest_sample: which one that is.
        broken: the first unusable samples.
        cut_shards: shards with something wrong at their end.
    """

    looked_at: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    with_images: int = 0
    text_only: int = 0
    images: int = 0
    missing_images: int = 0
    corrupt_images: int = 0
    image_notes: dict[str, int] = field(default_factory=dict)
    longest_text: int = 0
    longest_sample: str | None = None
    broken: list[Broken] = field(default_factory=list)
    cut_shards: list[str] = field(default_factory=list)

    @property
    def unusable_share(self) -> float:
        """The share of the checked samples that are unusable."""
        return sum(self.unusable.values()) / max(1, self.looked_at)

    def add(self, other: Tally) -> None:
        """Add the counts of later samples."""
        if other.longest_text > self.longest_text:
            self.longest_text, self.longest_sample = other.longest_text, other.longest_sample
        for name in ("looked_at", "with_images", "text_only", "images", "missing_images", "corrupt_images"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.unusable = dict(Counter(self.unusable) + Counter(other.unusable))
        self.image_notes = dict(Counter(self.image_notes) + Counter(other.image_notes))
        self.broken = (self.broken + other.broken)[:LISTED]
        self.cut_shards += other.cut_shards


class SampleChunk(NamedTuple):
    """Samples of one shard for one process: `shard` is its number in the dataset, `seed` the recipe's.

    `first` is True for the first chunk of a shard, with which the shard's end is looked at.
    """

    section: DatasetSection
    tar: Shard
    shard: int
    indices: Sequence[int]
    seed: int
    first: bool
    cache: ShardCache


def check_samples(
    section: DatasetSection,
    tars: Sequence[Shard],
    counts: Sequence[int],
    *,
    seed: int,
    limit: int | None,
    workers: int,
    cache: ShardCache,
) -> Tally:
    """Check `limit` samples spread evenly over the shards, or at all of them (None), in `workers` processes."""
    chunks: list[SampleChunk] = []
    for shard, indices in _spread(counts, limit):
        first = not chunks or chunks[-1].shard != shard
        chunks.append(SampleChunk(section, tars[shard], shard, indices, seed, first, cache))
    tally = Tally()
    with tqdm(desc=section.name, total=sum(len(c.indices) for c in chunks), unit="sample", disable=None) as bar:
        for found in _mapped(chunks, workers):
            tally.add(found)
            bar.update(found.looked_at)
    return tally


def _mapped(chunks: list[SampleChunk], workers: int) -> Iterator[Tally]:
    """Yield `check_chunk` of every chunk, in order."""
    if workers < 2 or len(chunks) < 2:
        yield from map(check_chunk, chunks)
        return
    with WorkerPool(workers, remedy="use fewer --workers") as pool:
        yield from pool.map(check_chunk, chunks)


def _spread(counts: Sequence[int], limit: int | None) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield (shard, indices in it) of the samples to check, in order."""
    total = sum(counts)
    if limit is None or limit >= total:
        for shard, count in enumerate(counts):
            yield from ((shard, range(first, min(first + _CHUNK, count))) for first in range(0, count, _CHUNK))
        return
    ends = np.cumsum([0, *counts])
    chosen = np.arange(limit) * total // limit
    for shard in range(len(counts)):
        first, last = np.searchsorted(chosen, ends[shard : shard + 2])
        if first < last:
            yield shard, (chosen[first:last] - ends[shard]).tolist()


def check_chunk(chunk: SampleChunk) -> Tally:
    """Check the samples of a chunk."""
    tally, reader = Tally(), ShardReader(cache=chunk.cache)
    if chunk.first:
        tally.cut_shards += _cut(chunk.tar)
    for index in chunk.indices:
        tally.looked_at += 1
        try:
            _check(tally, reader, chunk, index)
        except SampleError as error:
            tally.unusable[error.reason] = tally.unusable.get(error.reason, 0) + 1
            tally.missing_images += error.reason == "missing_image"
            tally.images += error.reason == "missing_image"
            if len(tally.broken) < LISTED:
                tally.broken.append(Broken(str(chunk.tar), reader.key(chunk.tar, index), error.reason, str(error)))
    reader.close()
    return tally


def _check(tally: Tally, reader: ShardReader, chunk: SampleChunk, index: int) -> None:
    """Check one sample; raises SampleError if training would leave it out."""
    raw = reader.read(chunk.tar, index)
    where = f"{chunk.tar}: sample {raw.key}"
    corrupt = list(_corrupt(tally, raw, background_of(chunk.section)))
    tally.images += len(raw.images)
    tally.corrupt_images += len(corrupt)
    # the random choices of the first epoch
    draw = sample_rng(chunk.seed, SampleRef(0, chunk.section.name, 0, chunk.shard, index))
    _measure(tally, render_sample(raw, draw, clean=chunk.section.clean, where=where), where)
    if corrupt:
        raise SampleError(corrupt[0].reason, f"{where}: {corrupt[0]}")
    tally.with_images += bool(raw.images)
    tally.text_only += not raw.images


def _corrupt(tally: Tally, raw: RawSample, background: Color | None) -> Iterator[ImageError]:
    """Yield what is wrong with the images of a sample; count what is special about the others."""
    for image in raw.images:
        try:
            open_image(image, background=background)
            tally.image_notes = dict(Counter(tally.image_notes) + Counter(_notes(read_traits(image), background)))
        except ImageError as error:
            yield error


def _notes(traits: ImageTraits, background: Color | None) -> Iterator[str]:
    """Yield what is special about an image, in words that follow a number of images."""
    ignored = background is None
    if traits.orientation != 1:
        yield "turned by EXIF, which is ignored as in the original" if ignored else "turned upright by EXIF"
    if traits.transparent:
        yield "with alpha, which is dropped as in the original" if ignored else "with alpha, laid on the background"
    if traits.deep:
        yield "of more than 8 bits, scaled to 8"
    if traits.animated:
        yield "of several frames or pages, of which the first is used"


def _measure(tally: Tally, rendered: Rendered, where: str) -> None:
    length = sum(len(question or "") + len(answer) for question, answer in rendered.turns)
    if length > tally.longest_text:
        tally.longest_text, tally.longest_sample = length, where


def _cut(tar: Shard) -> list[str]:
    """Return what is wrong at the end of a local shard, of which training would warn once, when it is indexed."""
    if not isinstance(tar, Path):
        return []
    try:
        index = load_index(tar)
        members = index.members(len(index) - 1)
        problem = bad_end(tar, members[-1].offset + members[-1].size)
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{tar}: cannot open the shard: {error.strerror}"]
    return [f"{tar}: {problem}; its {len(index)} complete samples are used"] if problem else []
