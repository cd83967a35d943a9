"""One training sample: from a raw record to tokens and pixels, or the reason why it is skipped.

torch and transformers are imported only where they are needed: `check-data` renders samples without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinygptv_ds.config.recipe import Recipe, TextSection
from tinygptv_ds.data.loader.background import background_of
from tinygptv_ds.data.shards.reader import RawSample, ShardReader
from tinygptv_ds.data.shards.records import SampleError
from tinygptv_ds.data.stream.mixture import SampleRef, sample_rng, step_rng
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.errors import DataError
from tinygptv_ds.features.format import FeatureShape
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.image_limits import ImageError
from tinygptv_ds.processing.sequence import IGNORE, ImageTokens, TokenRow, build_sequence
from tinygptv_ds.processing.text import Draw, Rendered, render

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_NO_PIXELS = np.zeros((0, 3, 1, 1), dtype=np.uint8)


@dataclass(frozen=True)
class Tokens:
    """Everything needed to turn a record into a row of tokens and its images into pixels.

    Attributes:
        tokenizer: Phi's.
        text: the recipe's templates and lengths.
        image: the image token and how many rows an image takes.
        image_size: side of the square images in pixels.
        decoding: `data.decoding` of the recipe.
    """

    tokenizer: PreTrainedTokenizerBase
    text: TextSection
    image: ImageTokens
    image_size: int
    decoding: str = "exact"


def open_tokens(recipe: Recipe, config: PretrainedConfig) -> Tokens:
    """Load the tokenizer next to Phi's weights; the number and size of images come from the model's configuration."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.model.phi, local_files_only=True, trust_remote_code=False)
    image = ImageTokens(config.image_token_id, config.num_query_tokens)
    return Tokens(tokenizer, recipe.text, image, config.vision_config.image_size, recipe.data.decoding)


@dataclass(frozen=True)
class Sample:
    """One sample in tokens and pixels or features.

    Attributes:
        ref: which sample it is.
        sequence: its row of tokens.
        pixels: uint8 `[n, 3, S, S]`; empty where there are features.
        features: `[n, queries, width]`, or None.
    """

    ref: SampleRef
    sequence: TokenRow
    pixels: np.ndarray
    features: Tensor | None = None

    @property
    def images(self) -> int:
        """Number of its images."""
        return len(self.pixels if self.features is None else self.features)


@dataclass(frozen=True)
class SampleDraft:
    """A sample whose text is tokenized and whose images are not decoded yet.

    Attributes:
        ref: which sample it is.
        where: shard and key, for messages.
        sequence: its row of tokens.
        images: encoded images, or features as stored.
    """

    ref: SampleRef
    where: str
    sequence: TokenRow
    images: tuple[bytes, ...]


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was left out of its micro-batch.

    Attributes:
        ref: which sample.
        reason: one of `reader.REASONS`, for counting.
        message: names shard and key, and what is wrong.
    """

    ref: SampleRef
    reason: str
    message: str


def load_sample(stream: OpenStream, reader: ShardReader, ref: SampleRef, tokens: Tokens) -> Sample:
    """Read, render, tokenize and decode one sample, or take the stored features of its images.

    Raises:
        SampleError: the sample cannot be used; names shard and key.
    """
    return decode_sample(draft_sample(stream, reader, ref, tokens), stream, tokens)


def draft_sample(stream: OpenStream, reader: ShardReader, ref: SampleRef, tokens: Tokens) -> SampleDraft:
    """Read one sample and tokenize its text: `load_sample` without the pixels.

    Raises:
        SampleError: as `load_sample`.
    """
    tar = stream.shards[ref.dataset][ref.shard]
    raw = reader.read(tar, ref.index)
    where = f"{tar}: sample {raw.key}"
    draw = sample_rng(stream.seed, ref)
    rendered = render_sample(raw, draw, clean=stream.sections[ref.dataset].clean, where=where)
    try:
        if tokens.text.prompt_per == "step":
            draw = step_rng(stream.seed, ref.position // stream.batch_size)
        sequence = build_sequence(rendered, len(raw.images), tokens.tokenizer, tokens.text, tokens.image, draw)
    except DataError as error:
        raise SampleError("bad_record", f"{where}: {error}") from error
    _check_length(sequence, stream.max_tokens, where)
    return SampleDraft(ref, where, sequence, raw.images)


def decode_sample(draft: SampleDraft, stream: OpenStream, tokens: Tokens) -> Sample:
    """Decode the images of a draft, or read their features: the second half of `load_sample`.

    Raises:
        SampleError: as `load_sample`.
    """
    if stream.features is not None:
        return Sample(draft.ref, draft.sequence, _NO_PIXELS, read_features(draft.images, stream.features, draft.where))
    background = background_of(stream.sections[draft.ref.dataset])
    try:
        pixels = [to_pixels(image, tokens.image_size, tokens.decoding, background=background) for image in draft.images]
    except ImageError as error:
        raise SampleError(error.reason, f"{draft.where}: {error}") from error
    return Sample(draft.ref, draft.sequence, _stack(pixels))


def render_sample(raw: RawSample, draw: Draw, *, clean: bool, where: str) -> Rendered:
    """Render the turns of a record as text.

    Args:
        raw: as read from its shard.
        draw: makes the random choices.
        clean: apply the original's text cleaning (`clean` of the recipe's dataset).
        where: shard and key, for messages.

    Raises:
        SampleError: bad_record, or empty_answer where no answer holds a word. (The original trains on the end symbol
            alone then.)
    """
    try:
        rendered = render(raw.record, len(raw.images), draw, clean=clean)
    except DataError as error:
        raise SampleError("bad_record", f"{where}: {error}") from error
    if not any(answer.strip() for _, answer in rendered.turns):
        raise SampleError("empty_answer", f"{where}: its caption or answer is empty")
    return rendered


def read_features(members: Sequence[bytes], shape: FeatureShape, where: str) -> Tensor:
    """Return the stored features of a sample's images, `[images, queries, width]` in the dtype of `shape`.

    Raises:
        SampleError: torn_features, where a member has another size.
    """
    import torch

    from tinygptv_ds.dtypes import DTYPES

    odd = [len(data) for data in members if len(data) != shape.nbytes]
    if odd:
        raise SampleError("torn_features", f"{where}: features of {odd[0]} bytes instead of {shape.nbytes}")
    data, dtype = bytearray(b"".join(members)), DTYPES[shape.dtype]
    rows = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return rows.view(len(members), shape.queries, shape.width)


def _stack(pixels: list[np.ndarray]) -> np.ndarray:
    """Stack images to uint8 `[n, 3, S, S]`; a single image, the most frequent case, is not copied."""
    if len(pixels) == 1:
        return pixels[0][None]
    return np.stack(pixels) if pixels else _NO_PIXELS


def _check_length(sequence: TokenRow, max_tokens: int | None, where: str) -> None:
    """Raise SampleError for a sample without a target token, or one that is too long for any micro-batch."""
    if not (sequence.labels != IGNORE).any():
        raise SampleError("no_target_tokens", f"{where}: no token of its answer is within the length limits")
    if max_tokens is not None and len(sequence) > max_tokens:
        message = f"{where}: {len(sequence)} tokens, more than train.max_tokens ({max_tokens})"
        raise SampleError("too_long", message)
