"""Which of several answers the model finds likeliest: the loss of each, as IconQA is answered (MiniGPT-v2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.processor import Image, TinyGPTVProcessor
from tinygptv_ds.processing.sequence import ImageTokens, build_sequence
from tinygptv_ds.processing.sequence import Sequence as Row
from tinygptv_ds.processing.text import Rendered


@dataclass(frozen=True)
class Choice:
    """A question with its images and the answers to choose from, one at least."""

    question: str
    images: Sequence[Image]
    candidates: Sequence[str]


@dataclass(frozen=True)
class CandidateLosses:
    """The losses of one question's candidates.

    Attributes:
        means: fp32 `[C]`, mean over the tokens of each candidate and its end symbol.
        tokens: int64 `[C]`, how many these are.
    """

    means: Tensor
    tokens: Tensor


def candidate_losses(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    choices: Sequence[Choice],
    text: TextSection,
    *,
    batch_size: int = 8,
) -> Iterator[CandidateLosses]:
    """Losses of every candidate by itself, in the row of training; they do not depend on the batch.

    Args:
        model: in evaluation mode.
        processor: its own.
        choices: questions with `<ImageHere>`, as they stand before the template.
        text: template, end symbol and lengths.
        batch_size: questions at once; an image is looked at once for all candidates.

    Raises:
        DataError: placeholders and images do not match, or an image cannot be decoded.
    """
    image_tokens = ImageTokens(processor.image_token_id, processor.num_query_tokens)
    for first in range(0, len(choices), batch_size):
        chunk = choices[first : first + batch_size]
        rows, places = [], []
        offsets = np.cumsum([0, *(len(choice.images) for choice in chunk)])
        for choice, offset in zip(chunk, offsets, strict=False):
            for candidate in choice.candidates:
                turn = Rendered(((choice.question, candidate),))
                rows.append(
                    build_sequence(turn, len(choice.images), processor.tokenizer, text, image_tokens, lambda _: 0)
                )
                places.append(offset * image_tokens.count)
        pixels = [to_pixels(image, processor.image_size) for choice in chunk for image in choice.images]
        means, tokens = _losses(model, rows, places, np.stack(pixels) if pixels else None)
        counts = [len(choice.candidates) for choice in chunk]
        yield from map(CandidateLosses, means.split(counts), tokens.split(counts))


def rank(means: Tensor, offered: int | None = None) -> list[int]:
    """Numbers of the candidates, the likeliest first; those from number `offered` on come last."""
    allowed = means.clone()
    allowed[len(means) if offered is None else offered :] = torch.inf
    return allowed.argsort(stable=True).tolist()


def batch_means(losses: Sequence[CandidateLosses]) -> Tensor:
    """fp32 `[C]`: what the original ranks by, one mean for each number of candidate over all questions of a batch.

    It is the loss that its forward returns, so that every question of a batch gets the same answer; right for batches
    of one only, with which the published IconQA score was made.
    """
    means, tokens = (torch.stack([getattr(each, name) for each in losses]) for name in ("means", "tokens"))
    return (means * tokens).sum(0) / tokens.sum(0)


@torch.no_grad()
def _losses(
    model: TinyGPTVForConditionalGeneration, rows: Sequence[Row], places: Sequence[int], pixels: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    """Mean loss and number of targets of each row, `[rows]` both; `places` is where each one's image rows begin."""
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths])
    labels = np.concatenate([row.labels for row in rows])
    learnt = np.flatnonzero(labels >= 0)
    packed = {
        "input_ids": np.concatenate([row.input_ids for row in rows]),
        "position_ids": np.concatenate([row.position_ids for row in rows]),
        "cu_seqlens": starts.astype(np.int32),
        "image_rows": np.concatenate([row.image_rows + start for row, start in zip(rows, starts, strict=False)]),
        "image_index": np.concatenate([row.image_index + place for row, place in zip(rows, places, strict=True)]),
        "target_rows": learnt - 1,
        "targets": labels[learnt],
    }
    inputs = {name: torch.from_numpy(array).to(model.device) for name, array in packed.items()}
    seen = None if pixels is None else torch.from_numpy(pixels).to(model.device)
    losses = model(**inputs, max_seqlen=max(lengths), pixel_values=seen).token_losses.cpu()
    row_of = torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)[learnt])
    tokens = row_of.bincount(minlength=len(rows))
    return losses.new_zeros(len(rows)).index_add_(0, row_of, losses) / tokens, tokens
