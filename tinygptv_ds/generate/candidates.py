"""Losses of candidate answers, by which the model chooses among them, as on IconQA (MiniGPT-v2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinygptv_ds.config.recipe import TextSection
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.generate.inputs import vision_inputs
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import ImageTokens, TokenRow, build_sequence
from tinygptv_ds.processing.text import Rendered


@dataclass(frozen=True)
class Choice:
    """A prompt with the answers to choose from, at least one."""

    prompt: Prompt
    candidates: Sequence[str]


@dataclass(frozen=True)
class CandidateLosses:
    """The losses of one prompt's candidates.

    Attributes:
        means: fp32 `[C]`, mean over the tokens of each candidate and its end symbol.
        tokens: int64 `[C]`, the number of these tokens.
    """

    means: Tensor
    tokens: Tensor


def candidate_losses(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    choices: Sequence[Choice],
    *,
    end_sym: str,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    batch_size: int = 8,
) -> Iterator[CandidateLosses]:
    """Compute the loss of every candidate separately, in a row as in training; it does not depend on the batch.

    Args:
        model: in evaluation mode.
        processor: the processor of the model.
        choices: prompts with their candidates. The rows of training start with the BOS token, whatever the prompt says.
        end_sym: appended to each candidate.
        max_prompt_tokens: where a prompt with images is cut.
        max_answer_tokens: where a candidate is cut.
        batch_size: prompts per batch; each image is encoded once for all candidates.

    Raises:
        DataError: placeholders and images do not match, or an image cannot be decoded.
    """
    text = TextSection(end_sym=end_sym, max_txt_len=max_answer_tokens, max_context_len=max_prompt_tokens)
    image_tokens = ImageTokens(processor.image_token_id, processor.num_query_tokens)
    for first in range(0, len(choices), batch_size):
        chunk = choices[first : first + batch_size]
        rows, places = [], []
        offsets = np.cumsum([0, *(len(choice.prompt.images) for choice in chunk)])
        for choice, offset in zip(chunk, offsets, strict=False):
            for candidate in choice.candidates:
                turn = Rendered(((choice.prompt.text, candidate),))
                images = len(choice.prompt.images)
                rows.append(build_sequence(turn, images, processor.tokenizer, text, image_tokens, lambda _: 0))
                places.append(offset * image_tokens.count)
        means, tokens = _losses(model, rows, places, vision_inputs(processor, [choice.prompt for choice in chunk]))
        counts = [len(choice.candidates) for choice in chunk]
        yield from map(CandidateLosses, means.split(counts), tokens.split(counts))


@torch.no_grad()
def _losses(
    model: TinyGPTVForConditionalGeneration, rows: Sequence[TokenRow], places: Sequence[int], images: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and the number of target tokens of each row, both `[rows]`.

    `places` holds the first image row of each row among those of all `images`, which are those of `vision_inputs`.
    """
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths])
    labels = np.concatenate([row.labels for row in rows])
    targets = np.flatnonzero(labels >= 0)
    packed = {
        "input_ids": np.concatenate([row.input_ids for row in rows]),
        "position_ids": np.concatenate([row.position_ids for row in rows]),
        "cu_seqlens": starts.astype(np.int32),
        "image_rows": np.concatenate([row.image_rows + start for row, start in zip(rows, starts, strict=False)]),
        "image_index": np.concatenate([row.image_index + place for row, place in zip(rows, places, strict=True)]),
        "target_rows": targets - 1,
        "targets": labels[targets],
    }
    tensors = {name: torch.from_numpy(array) for name, array in packed.items()} | images
    inputs = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    losses = model(**inputs, max_seqlen=max(lengths)).token_losses.cpu()
    row_of = torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)[targets])
    tokens = row_of.bincount(minlength=len(rows))
    return losses.new_zeros(len(rows)).index_add_(0, row_of, losses) / tokens, tokens
