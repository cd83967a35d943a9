"""The steps of one rank, micro-batch by micro-batch, from dataloader workers.

A map from (step, number) to a micro-batch, read in order: whatever the number of workers, the batches are the same.
A sample that cannot be used drops out of its step and is reported; nothing else moves.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from tinygptv_ds.config.recipe import Recipe, TextSection
from tinygptv_ds.data.loader.batch import Batch, Sample, collate
from tinygptv_ds.data.loader.rendering import in_words
from tinygptv_ds.data.loader.workers import Stuck, Workers, WorkersLostError
from tinygptv_ds.data.shards.reader import SampleError, ShardReader
from tinygptv_ds.data.stream.mixture import SampleRef, sample_rng, step_rng
from tinygptv_ds.data.stream.plan import OpenStream, Planner
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.errors import DataError
from tinygptv_ds.features.format import FeatureShape
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.sequence import IGNORE, ImageTokens, Sequence, build_sequence

log = logging.getLogger(__name__)
_LOSSES, _WITHIN = 3, 100  # dataloader workers may be lost so many times within so many steps
_NO_PIXELS = np.zeros((0, 3, 1, 1), dtype=np.uint8)


@dataclass(frozen=True)
class Tokens:
    """What turns words and images into a row: tokenizer, text section, image rows, images' size and decoding."""

    tokenizer: PreTrainedTokenizerBase
    text: TextSection
    image: ImageTokens
    image_size: int
    decoding: str = "exact"


def open_tokens(recipe: Recipe, config: PretrainedConfig) -> Tokens:
    """The tokenizer next to Phi's weights, and what the model's configuration says of images."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi, local_files_only=True, trust_remote_code=False)
    image = ImageTokens(config.image_token_id, config.num_query_tokens)
    return Tokens(tokenizer, recipe.text, image, config.vision_config.image_size, recipe.data.decoding)


@dataclass(frozen=True)
class Skipped:
    """A sample that dropped out: which, one word for counting, and the whole message with shard and key."""

    ref: SampleRef
    reason: str
    message: str


@dataclass(frozen=True)
class Loaded:
    """A micro-batch and what dropped out of it."""

    batch: Batch
    skipped: tuple[Skipped, ...]

    def pin_memory(self) -> Loaded:
        """Called by torch's DataLoader."""
        return Loaded(self.batch.pin_memory(), self.skipped)


@dataclass(frozen=True)
class Draft:
    """A sample whose images are not decoded yet; `where` names shard and key in messages."""

    ref: SampleRef
    where: str
    sequence: Sequence
    images: tuple[bytes, ...]


def load_sample(stream: OpenStream, reader: ShardReader, ref: SampleRef, tokens: Tokens) -> Sample:
    """Read, draw, tokenise and decode one sample, or take the features of its images.

    Raises:
        SampleError: the sample cannot be used; names shard and key.
    """
    return decode_sample(draft_sample(stream, reader, ref, tokens), tokens, stream.features)


def draft_sample(stream: OpenStream, reader: ShardReader, ref: SampleRef, tokens: Tokens) -> Draft:
    """All of `load_sample` but the pixels; raises as it does."""
    tar = stream.shards[ref.dataset][ref.shard]
    raw = reader.read(tar, ref.index)
    where = f"{tar}: sample {raw.key}"
    draw = sample_rng(stream.seed, ref)
    rendered = in_words(raw, draw, clean=stream.sections[ref.dataset].clean, where=where)
    try:
        if tokens.text.prompt_per == "step":
            draw = step_rng(stream.seed, ref.position // stream.batch_size)
        sequence = build_sequence(rendered, len(raw.images), tokens.tokenizer, tokens.text, tokens.image, draw)
    except DataError as error:
        raise SampleError("bad_record", f"{where}: {error}") from error
    _check(sequence, stream.max_tokens, where)
    return Draft(ref, where, sequence, raw.images)


def decode_sample(draft: Draft, tokens: Tokens, features: FeatureShape | None) -> Sample:
    """The rest of `load_sample`: pixels, or features of this shape; raises as it does."""
    if features is not None:
        return Sample(draft.ref, draft.sequence, _NO_PIXELS, _features(draft.images, features, draft.where))
    try:
        pixels = [to_pixels(image, tokens.image_size, tokens.decoding) for image in draft.images]
    except DataError as error:
        raise SampleError("corrupt_image", f"{draft.where}: {error}") from error
    return Sample(draft.ref, draft.sequence, _stack(pixels))


def _stack(pixels: list[np.ndarray]) -> np.ndarray:
    """uint8 `[n, 3, S, S]`; a single image, which is the rule, is not copied."""
    if len(pixels) == 1:
        return pixels[0][None]
    return np.stack(pixels) if pixels else _NO_PIXELS


def _features(members: Seq[bytes], shape: FeatureShape, where: str) -> Tensor:
    """`[images, queries, width]` from what the shard holds."""
    odd = [len(data) for data in members if len(data) != shape.nbytes]
    if odd:
        raise SampleError("torn_features", f"{where}: features of {odd[0]} bytes instead of {shape.nbytes}")
    data, dtype = bytearray(b"".join(members)), DTYPES[shape.dtype]
    rows = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return rows.view(len(members), shape.queries, shape.width)


def _check(sequence: Sequence, max_tokens: int | None, where: str) -> None:
    """Raises SampleError for a sample that teaches nothing or can stand in no micro-batch."""
    if not (sequence.labels != IGNORE).any():
        raise SampleError("nothing_learnt", f"{where}: nothing of its answer is left to learn")
    if max_tokens is not None and len(sequence) > max_tokens:
        message = f"{where}: {len(sequence)} tokens, more than train.max_tokens ({max_tokens})"
        raise SampleError("too_long", message)


class MicroBatches(Dataset):
    """(step, number of the micro-batch in it) to the `Loaded` of this rank."""

    def __init__(self, stream: OpenStream, tokens: Tokens, *, rank: int, world_size: int) -> None:
        self._stream = stream
        self._tokens = tokens
        self._rank = rank
        self._planner = Planner(stream, world_size)
        self._reader = ShardReader(cache=stream.cache)
        self._no_features = None if stream.features is None else _features((), stream.features, "")

    def count(self, step: int) -> int:
        """Micro-batches of a step, the same on every rank."""
        if self._stream.micro_batch_size is not None:
            return -(-self._stream.batch_size // (self._stream.micro_batch_size * self._planner.world_size))
        return self._planner.plan(step).packing.micro_batches

    def __getitem__(self, place: tuple[int, int]) -> Loaded:
        step, number = place
        skipped: list[Skipped] = []
        drafts, samples = [], []
        # All words, then all images: by turns, each would push the other's code out of the core's caches.
        for ref in self._planner.plan(step).micro_batch(number, self._rank):
            with _counted(ref, skipped):
                drafts.append(draft_sample(self._stream, self._reader, ref, self._tokens))
        for draft in drafts:
            with _counted(draft.ref, skipped):
                samples.append(decode_sample(draft, self._tokens, self._stream.features))
        batch = collate(
            samples,
            self._stream.names,
            queries=self._tokens.image.count,
            image_size=self._tokens.image_size,
            bos=self._tokens.tokenizer.bos_token_id,
            no_features=self._no_features,
        )
        return Loaded(batch, tuple(sorted(skipped, key=lambda item: item.ref.position)))


@contextmanager
def _counted(ref: SampleRef, skipped: list[Skipped]) -> Iterator[None]:
    """A sample that cannot be used is noted in `skipped`."""
    try:
        yield
    except SampleError as error:
        skipped.append(Skipped(ref, error.reason, str(error)))


def load_steps(
    dataset: MicroBatches,
    *,
    first: int,
    last: int,
    num_workers: int,
    pin_memory: bool,
    read_seconds: float = 0.0,
    stuck: Stuck | None = None,
) -> Iterator[list[Loaded]]:
    """The micro-batches of steps `first` to `last` - 1, a list for each step.

    Dataloader workers that are killed or hang are begun again at the step that is awaited: a batch is a function of its
    place, so that nothing is lost or comes twice.

    Args:
        dataset: this rank's.
        first: 0, or where a resumed run goes on.
        last: where the run ends.
        num_workers: dataloader workers; 0 loads in this process.
        pin_memory: for a GPU.
        read_seconds: one micro-batch may take at most from a dataloader worker; 0: no limit.
        stuck: called before dataloader workers that hang are killed.

    Raises:
        DataError: dataloader workers were lost again and again.
    """
    lost_at: deque[int] = deque(maxlen=_LOSSES)
    step = first
    while step < last:
        try:
            for loaded in _steps(dataset, step, last, num_workers, pin_memory, read_seconds, stuck):
                yield loaded
                step += 1
        except WorkersLostError as lost:
            if len(lost_at) == _LOSSES and step - lost_at[0] < _WITHIN:
                raise DataError(
                    f"{lost}, while step {step + 1} was awaited, for the {_LOSSES + 1}th time within {_WITHIN} steps. "
                    "Where memory is short, lower data.num_workers or train.micro_batch_size; where a read hangs, look "
                    "at the storage of the shards, or raise data.read_timeout_seconds"
                ) from lost
            lost_at.append(step)
            log.warning("%s, while step %d was awaited; new ones begin at this step", lost, step + 1)


def _steps(
    dataset: MicroBatches,
    first: int,
    last: int,
    num_workers: int,
    pin_memory: bool,
    read_seconds: float,
    stuck: Stuck | None,
) -> Iterator[list[Loaded]]:
    """As `load_steps`, as long as the dataloader workers live; raises WorkersLostError."""
    counts: deque[int] = deque()

    def places() -> Iterator[tuple[int, int]]:
        for step in range(first, last):
            counts.append(dataset.count(step))
            yield from ((step, number) for number in range(counts[-1]))

    workers = Workers(
        dataset,
        places(),
        num_workers=num_workers,
        pin_memory=pin_memory,
        read_seconds=read_seconds,
        stuck=stuck,
    )
    for _ in range(first, last):
        head = workers.next()  # by now its step has been counted
        yield [head, *(workers.next() for _ in range(counts.popleft() - 1))]
