"""Prompts and pictures to model inputs for inference; the same tokens and pixels as in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tinygptv_ds.processing.images import to_pixels
from tinygptv_ds.processing.sequence import ImageTokens, prompt_ids, tokenize


class TinyGPTVProcessor:
    """Turns prompts with `<ImageHere>` and their pictures into padded inputs for `generate`.

    Args:
        tokenizer: Phi's.
        image_size: side of the square pictures.
        image: how a picture stands in a row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_size: int, image: ImageTokens) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.image = image

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[bytes | Path | Image.Image]],
        *,
        begin_token: bool = False,
    ) -> dict[str, Tensor]:
        """Left-padded inputs for a batch of prompts.

        Args:
            prompts: each with as many `<ImageHere>` as it has pictures.
            images: the pictures of each prompt.
            begin_token: put the begin token in front, as in training. The original does not at inference.

        Returns:
            `input_ids` and `attention_mask`, int64 `[B, L]`, and `pixel_values`, uint8 `[N, 3, S, S]`, where there is
            any picture.

        Raises:
            DataError: placeholders and pictures do not match, or a picture cannot be decoded.
        """
        begin = [self.tokenizer.bos_token_id] if begin_token else []
        rows = [
            begin + prompt_ids(self.tokenizer, prompt, len(pictures), self.image)
            for prompt, pictures in zip(prompts, images, strict=True)
        ]
        longest = max(map(len, rows))
        pad = self.tokenizer.bos_token_id
        inputs = {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        pixels = [to_pixels(picture, self.image_size) for pictures in images for picture in pictures]
        if pixels:
            inputs["pixel_values"] = torch.from_numpy(np.stack(pixels))
        return inputs

    def stop_ids(self, stop: str) -> list[int]:
        """Tokens that end generation: the end token, and `stop` (also after a space) where that is one token.

        What continues past a stop of several tokens is cut by `decode`.
        """
        forms = [tokenize(self.tokenizer, form) for form in (stop, f" {stop}")]
        return [self.tokenizer.eos_token_id, *(ids[0] for ids in forms if len(ids) == 1)]

    def decode(self, ids: Tensor, stop: str) -> list[str]:
        """The answers in new tokens `[B, T]`: cut at the end token and at `stop`, stripped."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [(text.split(stop)[0] if stop.strip() else text.split("\n")[0]).strip() for text in texts]
