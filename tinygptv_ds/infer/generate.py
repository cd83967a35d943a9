"""From a run or an exported folder to answers, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from tinygptv_ds.convert.resolve import resolve
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import Picture, TinyGPTVProcessor


def load_model(
    path: Path, dtype: torch.dtype, *, recipe: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[TinyGPTVForConditionalGeneration, TinyGPTVProcessor]:
    """A model ready to answer, on the GPU where there is one.

    Args:
        path: an exported folder, or trained weights in any form that `resolve` takes.
        dtype: of the weights.
        recipe: for trained weights that do not tell where their base lies, as in `resolve`.
        overrides: changes to that recipe.

    Raises:
        WeightsError: there is no model at `path`, or its base weights are not found.
    """
    if (path / "config.json").is_file() and (path / "processor_config.json").is_file():
        transformers_logging.disable_progress_bar()
        model = TinyGPTVForConditionalGeneration.from_pretrained(path, dtype=dtype)
        processor = TinyGPTVProcessor.from_pretrained(path)
    else:
        found = resolve(path, recipe, overrides)
        model, processor = found.model(dtype), TinyGPTVProcessor.for_model(found.config, found.tokenizer())
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def answers(
    model: TinyGPTVForConditionalGeneration,
    processor: TinyGPTVProcessor,
    questions: Sequence[tuple[str, Sequence[Picture]]],
    *,
    stop: str,
    max_new_tokens: int = 20,
    batch_size: int = 32,
    begin_token: bool = False,
    in_step: bool = False,
) -> Iterator[str]:
    """Greedy answers, one per question, in order.

    Args:
        model: from `load_model`.
        processor: from `load_model`.
        questions: whole prompts with `<ImageHere>`, and their pictures.
        stop: ends an answer; the text before it is kept. "###" in stages 3 and 4.
        max_new_tokens: at most.
        batch_size: prompts at once.
        begin_token: put the begin token in front, as in training; the original does not at inference.
        in_step: every rank generates as often and as long, as ranks of ZeRO-3 must, which gather weights together.

    Raises:
        DataError: placeholders and pictures do not match, or a picture cannot be decoded.
    """
    for first in range(0, len(questions), batch_size):
        chunk = questions[first : first + batch_size]
        inputs = processor([list(p) for _, p in chunk], [text for text, _ in chunk], begin_token=begin_token)
        if in_step and "pixel_values" not in inputs:  # the others' may have pictures: the ViT has to run here too
            size = processor.image_size
            inputs["pixel_values"] = torch.zeros(0, 3, size, size, dtype=torch.uint8)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=processor.stop_ids(stop),
                pad_token_id=processor.tokenizer.bos_token_id,
                synced_gpus=in_step,
            )
        yield from processor.answers(ids[:, inputs["input_ids"].shape[1] :], stop)
