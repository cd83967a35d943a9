"""From a prompt to what the model reads: token ids, and images as pixels or features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinygptv_ds.errors import DataError
from tinygptv_ds.generate.conversation import Prompt
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.processor import ImageInput, TinyGPTVProcessor


def prompt_tokens(
    model: TinyGPTVForConditionalGeneration, processor: TinyGPTVProcessor, prompt: Prompt, new_tokens: int
) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        DataError: placeholders and images do not match, or the prompt with its answer exceeds the model's context.
    """
    images = len(prompt.images)
    row = processor.row(prompt.parts, images, add_bos_token=prompt.add_bos_token)
    context = model.config.text_config.max_position_embeddings
    if len(row) + new_tokens > context:
        raise DataError(
            f"the prompt of {len(row)} tokens ({images * processor.num_query_tokens} of them for {images} "
            f"image(s)) and an answer of up to {new_tokens} exceed the model's {context}; shorten the prompt, "
            "begin a new conversation, or lower max_new_tokens"
        )
    if not row:
        raise DataError("the prompt is empty; give it words or an image")
    return row


def vision_inputs(processor: TinyGPTVProcessor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Return the images of all prompts as `pixel_values` or `image_features`; empty without images."""
    pixels: list[ImageInput] = []
    features: list[Tensor] = []
    for image in (image for prompt in prompts for image in prompt.images):
        if isinstance(image, Tensor):
            features.append(image)
        else:
            pixels.append(image)
    if features:
        return {"image_features": torch.stack(features)}
    stacked = processor.pixels(pixels)
    return {} if stacked is None else {"pixel_values": stacked}


def describe(prompt: Prompt, processor: TinyGPTVProcessor) -> str:
    """Return the exact text of a prompt, its length in tokens, and what ends the answer."""
    images = len(prompt.images)
    tokens = len(processor.row(prompt.parts, images, add_bos_token=prompt.add_bos_token))
    begin = ", BOS token in front" if prompt.add_bos_token else ""
    seen = f", {images * processor.num_query_tokens} of them for {images} image(s)" if images else ""
    stops = " ".join(map(repr, prompt.stop))
    return f"--- prompt: {tokens} tokens{seen}{begin}; stops at {stops}\n{prompt.text}\n---"
