"""From a run or an exported folder to answers, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from tinygptv_ds.convert.export import load_run
from tinygptv_ds.errors import WeightsError
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import TinyGPTVProcessor
from tinygptv_ds.processing.sequence import ImageTokens

Picture = bytes | Path | Image.Image


def load_model(path: Path, dtype: torch.dtype) -> tuple[TinyGPTVForConditionalGeneration, TinyGPTVProcessor]:
    """A model ready to answer, on the GPU where there is one.

    Args:
        path: an exported folder, a finished run directory, or its `model/`.
        dtype: of the weights.

    Raises:
        WeightsError: there is no model at `path`.
    """
    if (path / "config.json").is_file() and (path / "tokenizer_config.json").is_file():
        transformers_logging.disable_progress_bar()
        model = TinyGPTVForConditionalGeneration.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    elif path.exists():
        model, tokenizer = load_run(path, dtype=dtype)
    else:
        raise WeightsError(f"{path} does not exist; name an exported folder or a finished run directory")
    config = model.config
    image = ImageTokens(config.image_token_id, config.num_query_tokens)
    processor = TinyGPTVProcessor(tokenizer, config.vision_config.image_size, image)
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

    Raises:
        DataError: placeholders and pictures do not match, or a picture cannot be decoded.
    """
    for first in range(0, len(questions), batch_size):
        chunk = questions[first : first + batch_size]
        inputs = processor([text for text, _ in chunk], [pictures for _, pictures in chunk], begin_token=begin_token)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=processor.stop_ids(stop),
                pad_token_id=processor.tokenizer.bos_token_id,
            )
        yield from processor.decode(ids[:, inputs["input_ids"].shape[1] :], stop)
