"""Micro-batches of one rank, in order, from loader processes.

A map from a running number to a micro-batch, read in order: whatever the number of workers, the batches are the same.
A sample that cannot be used drops out of its step and is reported; nothing else moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from tinygptv_ds.config.schema import Recipe, TextSection
from tinygptv_ds.data.batch import Batch, Sample, collate
from tinygptv_ds.data.features import FeatureShape
from tinygptv_ds.data.mixture import SampleRef, sample_rng, step_rng
from tinygptv_ds.data.reader import SampleError, ShardReader
from tinygptv_ds.data.stream import OpenStream
from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.images import to_pixels
from tinygptv_ds.processing.sequence import ImageTokens, build_sequence
from tinygptv_ds.processing.text import render

_NO_PIXELS = np.zeros((0, 3, 1, 1), dtype=np.uint8)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Tokens:
    """What turns words and pictures into a row: tokenizer, the recipe's text section, picture rows and size."""

    tokenizer: PreTrainedTokenizerBase
    text: TextSection
    image: ImageTokens
    image_size: int


def open_tokens(recipe: Recipe, config: PretrainedConfig) -> Tokens:
    """The tokenizer beside Phi's weights, and what the model's configuration says of pictures."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi, local_files_only=True, trust_remote_code=False)
    image = ImageTokens(config.image_token_id, config.num_query_tokens)
    return Tokens(tokenizer, recipe.text, image, config.vision_config.image_size)


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


def load_sample(stream: OpenStream, reader: ShardReader, ref: SampleRef, tokens: Tokens) -> Sample:
    """Read, draw, tokenise and decode one sample, or take the features of its pictures.

    Raises:
        SampleError: the sample cannot be used; names shard and key.
    """
    tar = stream.shards[ref.dataset][ref.shard]
    try:
        raw = reader.read(tar, ref.index)
    except SampleError:
        raise
    except DataError as error:
        raise SampleError("unreadable_shard", str(error)) from error
    where = f"{tar}: sample {raw.key}"
    draw = sample_rng(stream.seed, ref)
    try:
        rendered = render(raw.record, len(raw.images), draw, clean=stream.sections[ref.dataset].clean)
        if tokens.text.prompt_per == "step":
            draw = step_rng(stream.seed, ref.position // stream.batch_size)
        sequence = build_sequence(rendered, len(raw.images), tokens.tokenizer, tokens.text, tokens.image, draw)
    except DataError as error:
        raise SampleError("bad_record", f"{where}: {error}") from error
    if stream.features is not None:
        return Sample(ref, sequence, _NO_PIXELS, _features(raw.images, stream.features, where))
    try:
        pixels = [to_pixels(image, tokens.image_size) for image in raw.images]
    except DataError as error:
        raise SampleError("corrupt_image", f"{where}: {error}") from error
    return Sample(ref, sequence, np.stack(pixels) if pixels else _NO_PIXELS)


def _features(members: Seq[bytes], shape: FeatureShape, where: str) -> Tensor:
    """`[pictures, queries, width]` from what the shard holds."""
    odd = [len(data) for data in members if len(data) != shape.nbytes]
    if odd:
        raise SampleError("torn_features", f"{where}: features of {odd[0]} bytes instead of {shape.nbytes}")
    data, dtype = bytearray(b"".join(members)), DTYPES[shape.dtype]
    rows = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return rows.view(len(members), shape.queries, shape.width)


class MicroBatches(Dataset):
    """Number n (= step * accumulation + micro-batch) to the `Loaded` of this rank."""

    def __init__(self, stream: OpenStream, tokens: Tokens, *, rank: int, world_size: int, steps: int) -> None:
        self._stream = stream
        self._tokens = tokens
        self._rank, self._world_size = rank, world_size
        self._accumulation = stream.batch_size // (stream.micro_batch_size * world_size)
        self._steps = steps
        self._reader = ShardReader()
        self._no_features = None if stream.features is None else _features((), stream.features, "")

    def __len__(self) -> int:
        return self._steps * self._accumulation

    def __getitem__(self, number: int) -> Loaded:
        step, micro = divmod(number, self._accumulation)
        samples: list[Sample] = []
        skipped: list[Skipped] = []
        for ref in self._stream.micro_batch(step, micro, self._rank, self._world_size):
            try:
                samples.append(load_sample(self._stream, self._reader, ref, self._tokens))
            except SampleError as error:
                skipped.append(Skipped(ref, error.reason, str(error)))
        batch = collate(
            samples,
            self._stream.names,
            queries=self._tokens.image.count,
            image_size=self._tokens.image_size,
            bos=self._tokens.tokenizer.bos_token_id,
            no_features=self._no_features,
        )
        return Loaded(batch, tuple(skipped))


def micro_batches(dataset: MicroBatches, *, first: int, num_workers: int, pin_memory: bool) -> Iterator[Loaded]:
    """The micro-batches from number `first` on, in order.

    Args:
        dataset: this rank's.
        first: 0, or where a resumed run goes on.
        num_workers: loader processes; 0 loads in this process.
        pin_memory: for a GPU.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first, len(dataset)),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
    return iter(loader)
