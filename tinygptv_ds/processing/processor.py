"""Prompts and images to model inputs for inference; the same tokens and pixels as in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.detokenize import clean_up, cleans_up, decode
from tinygptv_ds.processing.image import to_pixels
from tinygptv_ds.processing.sequence import ImageTokens, check_placeholders, prompt_ids, tokenize, wrap
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, IMAGE_TAG

ImageInput = bytes | str | Path | Image.Image | np.ndarray  # encoded, a path, decoded, or from `to_pixels`


class TinyGPTVProcessor(ProcessorMixin):
    """Turns prompts with `<ImageHere>` and their images into padded inputs for `generate`, and tokens into answers.

    It is saved with an exported model, and `AutoProcessor` loads it from there.

    Args:
        tokenizer: the tokenizer of Phi.
        image_size: side of the square images.
        num_query_tokens: rows an image takes in the sequence.
        image_token_id: the token id at these rows.
        prompt_template: how a question was wrapped in training, with `{}` for the question; None: no wrap.
        end_sym: the text that ended every answer in training.
        chat_template: a chat template of transformers; TinyGPT-V has none of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 224,
        num_query_tokens: int = 32,
        image_token_id: int = 51199,
        prompt_template: str | None = None,
        end_sym: str = "###",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_size = image_size
        self.num_query_tokens = num_query_tokens
        self.image_token_id = image_token_id
        self.prompt_template = prompt_template
        self.end_sym = end_sym

    @classmethod
    def for_model(cls, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> TinyGPTVProcessor:
        """Build the processor that belongs to a model's configuration."""
        return cls(
            tokenizer,
            image_size=config.vision_config.image_size,
            num_query_tokens=config.num_query_tokens,
            image_token_id=config.image_token_id,
            prompt_template=config.prompt_template,
            end_sym=config.end_sym,
        )

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None = None,
        text: str | Sequence[str] = (),
        *,
        add_bos_token: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Return left-padded inputs for a batch of prompts.

        Args:
            images: the images of each prompt; a flat list is distributed by the placeholders.
            text: prompts, each with as many `<ImageHere>` as it has images; see `prompt`.
            add_bos_token: put the BOS token in front, as in training. The original does not at inference.
            return_tensors: "pt", the only kind there is.

        Returns:
            `input_ids` and `attention_mask`, int64 `[B, L]`, and `pixel_values`, uint8 `[N, 3, S, S]`, where there is
            any image.

        Raises:
            DataError: placeholders and images do not match, or an image cannot be decoded.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is supported")
        prompts = [text] if isinstance(text, str) else list(text)
        dealt = _deal(images, prompts)
        inputs = self.token_rows(prompts, [len(group) for group in dealt], add_bos_token=add_bos_token)
        pixels = self.pixels([image for group in dealt for image in group])
        if pixels is not None:
            inputs["pixel_values"] = pixels
        return BatchFeature(inputs)

    def token_rows(self, prompts: Sequence[str], images: Sequence[int], *, add_bos_token: bool) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` as `__call__` does, given how many images each prompt has."""
        pairs = zip(prompts, images, strict=True)
        return self.pad([self.row((prompt,), count, add_bos_token=add_bos_token) for prompt, count in pairs])

    def row(self, parts: Sequence[str], num_images: int, *, add_bos_token: bool) -> list[int]:
        """Return the token ids of one prompt, whose parts are tokenised one by one; errors as in `__call__`."""
        tokens = ImageTokens(self.image_token_id, self.num_query_tokens)
        check_placeholders("".join(parts), num_images)
        ids = [self.tokenizer.bos_token_id] if add_bos_token else []
        for part in parts:
            ids += prompt_ids(self.tokenizer, part, part.count(IMAGE_PLACEHOLDER), tokens)
        return ids

    def pad(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Pad rows of unequal lengths on the left; returns `input_ids` and `attention_mask` as `__call__` does."""
        longest = max(map(len, rows), default=0)
        pad = self.tokenizer.bos_token_id
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }

    def pixels(self, images: Sequence[ImageInput]) -> Tensor | None:
        """Return uint8 `[N, 3, S, S]`, None where there is no image; errors as in `__call__`."""
        if not images:
            return None
        size = self.image_size
        return torch.from_numpy(np.stack([p if isinstance(p, np.ndarray) else to_pixels(p, size) for p in images]))

    def prompt(self, question: str, num_images: int = 1) -> str:
        """Return a question as training words it: after its images, inside the template."""
        instruction = f"{IMAGE_TAG * num_images} {question} " if num_images else question
        return wrap(self.prompt_template, instruction)

    def stop_ids(self, stop: str | None = None) -> list[int]:
        """Return the tokens that end generation: the end token, and `stop` (or " " + `stop`) where that is one token.

        What continues past a stop of several tokens is cut by `answers`. None stops at `end_sym`, "" at the end token
        alone, as the original does in its benchmarks.
        """
        stop = self.end_sym if stop is None else stop
        forms = [tokenize(self.tokenizer, form) for form in (stop, f" {stop}")] if stop else []
        return [self.tokenizer.eos_token_id, *(ids[0] for ids in forms if len(ids) == 1)]

    def answers(self, ids: Tensor, stop: str | None = None) -> list[str]:
        """Decode the answers in new tokens `[B, T]`: cut at the end token and at `stop` (None: `end_sym`), stripped.

        Spaces are cleaned up as in everything that the original decodes.
        """
        stop = self.end_sym if stop is None else stop
        texts = [decode(self.tokenizer, row) for row in ids.tolist()]
        texts = [text.split(stop)[0] if stop else text for text in texts]
        return [(clean_up(text) if cleans_up(self.tokenizer) else text).strip() for text in texts]


def _deal(
    images: ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None, prompts: Sequence[str]
) -> list[list[ImageInput]]:
    """Return the images of each prompt."""
    given = [] if images is None else [images] if isinstance(images, ImageInput) else list(images)
    flat = [each for each in given if isinstance(each, ImageInput)]
    if len(flat) < len(given):
        if len(given) != len(prompts):
            raise DataError(f"{len(given)} lists of images for {len(prompts)} prompts; give one list a prompt")
        return [[each] if isinstance(each, ImageInput) else list(each) for each in given]
    counts = [prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts]
    if sum(counts) != len(flat):
        raise DataError(f"the prompts hold {sum(counts)} times {IMAGE_PLACEHOLDER}, but there are {len(flat)} images")
    remaining = iter(flat)
    return [[next(remaining) for _ in range(count)] for count in counts]
