"""Beam search, through `generate` of transformers: all answers of a batch from beginning to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tinygptv_ds.generate.row import Row
from tinygptv_ds.generate.stopping import StopAtText
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import TinyGPTVProcessor


def beam_search(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    rows: Sequence[Row],
    embeds: Tensor,
    mask: Tensor,
    *,
    in_step: bool,
) -> list[list[int]]:
    """Return the new tokens of each row, padded with the end token.

    Args:
        model: in evaluation mode.
        processor: the processor of the model.
        rows: all with the settings of the first, whose seed is that of all draws. It ends early when all are closed.
        embeds: the prompts `[rows, length, width]`, padded on the left.
        mask: `[rows, length]`, 1 for real positions.
        in_step: every rank runs the same number of forward passes.
    """
    wanted, tokenizer = rows[0].generation, processor.tokenizer
    shared = sorted(set.intersection(*(set(row.stops) for row in rows)))  # the others are cut from the finished text
    config = GenerationConfig(
        max_new_tokens=wanted.max_new_tokens,
        min_new_tokens=wanted.min_new_tokens or None,
        do_sample=wanted.samples,
        temperature=wanted.temperature if wanted.samples else None,
        top_p=wanted.top_p if wanted.samples else None,
        top_k=wanted.top_k if wanted.samples else None,
        num_beams=wanted.num_beams,
        length_penalty=wanted.length_penalty,
        repetition_penalty=1.0,  # applied by the processor below
        eos_token_id=processor.end_ids(shared),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    steps = LogitsProcessorList()
    if wanted.repetition_penalty != 1:  # generating from embeddings, it sees only new tokens, not the prompt's
        steps.append(RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty))
    criteria = [StopAtText(tokenizer, shared, wanted.min_new_tokens), _StopWhenClosed(rows)]
    with torch.random.fork_rng(enabled=wanted.samples):
        if wanted.samples:
            torch.manual_seed(rows[0].seed)
        found = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            generation_config=config,
            logits_processor=steps,
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=in_step,
        )
    return found.tolist()


class _StopWhenClosed(StoppingCriteria):
    """Ends all rows once no client waits for any of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Return bool `[B]`."""
        return torch.full((len(input_ids),), all(row.closed for row in self._rows), device=input_ids.device)
