"""Prompts and images to model inputs for inference; the same tokens and pixels as in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import IMAGE_PROCESSOR_NAME

from tinygptv_ds.errors import DataError
from tinygptv_ds.processing.chat_template import default_chat_template, rendered_parts
from tinygptv_ds.processing.detokenize import clean_up, cleans_up, decode
from tinygptv_ds.processing.image_processor import TinyGPTVImageProcessor
from tinygptv_ds.processing.processor_inputs import (
    ImageInput,
    Images,
    cut_rows,
    flat_images,
    in_order,
    padded_length,
    padded_offsets,
)
from tinygptv_ds.processing.sequence import ImageTokens, check_placeholders, prompt_ids, prompt_offsets, tokenize, wrap
from tinygptv_ds.processing.templates import choose_template
from tinygptv_ds.processing.text import IMAGE_PLACEHOLDER, IMAGE_TAG
from tinygptv_ds.remote_code import SavedWithCode


class TinyGPTVProcessor(SavedWithCode, ProcessorMixin):
    """Turns prompts with `<ImageHere>` and their images into padded inputs for `generate`, and tokens into answers.

    It is saved with an exported model. `AutoProcessor` loads it from there, `AutoImageProcessor` its image processor.

    Args:
        tokenizer: the tokenizer of Phi.
        image_size: side of the square images.
        num_query_tokens: rows an image takes in the sequence.
        image_token_id: the token id at these rows.
        prompt_template: how a question was wrapped in training, with `{}` for the question; None: no wrap.
        end_sym: the text that ended every answer in training.
        chat_template: a chat template of transformers; None: of the wording above, or of the original's demo where
            training had none.
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
        self._template = choose_template(None, prompt_template, end_sym)
        super().__init__(tokenizer, chat_template=chat_template or default_chat_template(self._template))
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

    @property
    def image_processor(self) -> TinyGPTVImageProcessor:
        """The part that reads images."""
        return TinyGPTVImageProcessor(self.image_size)

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the JSON, which every way of saving comes to, with that of the image processor next to it."""
        self.image_processor.to_json_file(Path(json_file_path).with_name(IMAGE_PROCESSOR_NAME))
        super().to_json_file(json_file_path, *args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """The names of the model's inputs."""
        return [*self.tokenizer.model_input_names, *TinyGPTVImageProcessor.model_input_names]

    def __call__(
        self,
        images: Images | str | Sequence[str] = None,
        text: str | Sequence[str] | Images = (),
        videos: None = None,
        audio: None = None,
        *,
        add_bos_token: bool = False,
        add_special_tokens: bool = True,
        padding: bool | str = True,
        padding_side: str = "left",
        pad_to_multiple_of: int | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        return_offsets_mapping: bool = False,
        return_text_replacement_offsets: bool = False,
    ) -> BatchFeature:
        """Return padded inputs for a batch of prompts.

        Args:
            images: the images of each prompt; a flat list is distributed by the placeholders. Encoded, a path, a PIL
                image, or an array or tensor as in `as_image`.
            text: prompts, each with as many `<ImageHere>` as it has images; see `prompt` and `apply_chat_template`. The
                two may be given in either order.
            videos: must be None, as `audio`; for callers that give all kinds of inputs.
            audio: must be None.
            add_bos_token: put the BOS token in front, as in training. The original does not at inference. A text of the
                chat template brings its own.
            add_special_tokens: as callers of transformers pass it; the tokenizer of Phi has none to add.
            padding: True or "longest", "max_length", or False for prompts of one length.
            padding_side: "left", as generation needs it, or "right".
            pad_to_multiple_of: pad to a multiple of this many tokens.
            truncation: cut prompts at `max_length` tokens.
            max_length: in tokens, those of images included.
            return_tensors: "pt" or None for tensors of torch, "np" for arrays.
            return_offsets_mapping: return `offset_mapping`, too.
            return_text_replacement_offsets: as `apply_chat_template` of transformers passes it; there is none, because
                `offset_mapping` counts the characters of the text as it is given.

        Returns:
            `input_ids` and `attention_mask`, int64 `[B, L]`, where there is text, and `pixel_values`, uint8
            `[N, 3, S, S]`, where there is any image; `offset_mapping`, lists of (begin, end) in the characters of each
            text, (0, 0) for padding.

        Raises:
            DataError: placeholders and images do not match, an image cannot be decoded, or would be cut off.
            ValueError: an option has a value that is not among these.
        """
        if videos is not None or audio is not None:
            raise ValueError("videos and audio: the model reads images and text")
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' and 'np' are supported")
        if truncation and max_length is None:
            raise ValueError("truncation=True needs max_length")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: 'left' or 'right'")
        given, prompts = in_order(images, text)
        if not prompts and given is not None:
            return self.image_processor.preprocess(given, return_tensors or "pt")
        dealt = _deal(given, prompts)
        pairs = zip(prompts, dealt, strict=True)
        rows = [self._prompt_row(prompt, len(group), add_bos_token) for prompt, group in pairs]
        rows = cut_rows(rows, max_length if truncation else None, self.image_token_id)
        length = padded_length(rows, padding, max_length, pad_to_multiple_of)
        inputs = self.pad(rows, length, side=padding_side)
        pixels = self.pixels([image for group in dealt for image in group])
        if pixels is not None:
            inputs["pixel_values"] = pixels
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()} if return_tensors == "np" else inputs
        features = BatchFeature(arrays)
        if return_offsets_mapping:
            offsets = [
                self._offsets(prompt, add_bos_token)[: len(row)] for prompt, row in zip(prompts, rows, strict=True)
            ]
            features["offset_mapping"] = padded_offsets(offsets, length, padding_side)
        return features

    def _prompt_row(self, prompt: str, num_images: int, add_bos_token: bool) -> list[int]:
        """Return the token ids of one prompt, that of a conversation as training lays it out."""
        parts, has_bos = self._parts(prompt)
        return self.row(parts, num_images, add_bos_token=add_bos_token or has_bos)

    def _parts(self, prompt: str) -> tuple[tuple[str, ...], bool]:
        """Return what of a prompt is tokenized separately, and whether its BOS token is left out there."""
        bos = str(self.tokenizer.bos_token)
        if self._template.in_parts and prompt.startswith(bos):
            return rendered_parts(prompt, self._template, bos), True
        return (prompt,), False

    def _offsets(self, prompt: str, add_bos_token: bool) -> list[tuple[int, int]]:
        """Return the place of each token of `_prompt_row` in the prompt; that of an added BOS token is empty."""
        parts, has_bos = self._parts(prompt)
        tokens = ImageTokens(self.image_token_id, self.num_query_tokens)
        first = [(0, len(str(self.tokenizer.bos_token)) if has_bos else 0)] if has_bos or add_bos_token else []
        return first + prompt_offsets(self.tokenizer, prompt, parts, tokens)

    def row(self, parts: Sequence[str], num_images: int, *, add_bos_token: bool) -> list[int]:
        """Return the token ids of one prompt, whose parts are tokenised one by one; errors as in `__call__`."""
        tokens = ImageTokens(self.image_token_id, self.num_query_tokens)
        check_placeholders("".join(parts), num_images)
        ids = [self.tokenizer.bos_token_id] if add_bos_token else []
        for part in parts:
            ids += prompt_ids(self.tokenizer, part, part.count(IMAGE_PLACEHOLDER), tokens)
        return ids

    def pad(self, rows: Sequence[list[int]], length: int | None = None, *, side: str = "left") -> dict[str, Tensor]:
        """Pad rows, by default to the longest; returns `input_ids` and `attention_mask` of `__call__`."""
        longest = max(map(len, rows), default=0) if length is None else length
        ids = torch.full((len(rows), longest), self.tokenizer.bos_token_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            ids[number, place] = torch.tensor(row, dtype=ids.dtype)
            mask[number, place] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def pixels(self, images: Sequence[ImageInput]) -> Tensor | None:
        """Return uint8 `[N, 3, S, S]`, None where there is no image; errors as in `__call__`."""
        return self.image_processor.pixels(list(images)) if images else None

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

    def end_ids(self, stops: Sequence[str]) -> list[int]:
        """Return all tokens that end generation: the end token, and those of `stop_ids` of each stop."""
        return sorted({self.tokenizer.eos_token_id}.union(*map(self.stop_ids, stops)))

    def answers(self, ids: Tensor, stop: str | None = None) -> list[str]:
        """Decode the answers in new tokens `[B, T]`: cut at the end token and at `stop` (None: `end_sym`), stripped.

        Spaces are cleaned up as in everything that the original decodes.
        """
        stop = self.end_sym if stop is None else stop
        texts = [decode(self.tokenizer, row) for row in ids.tolist()]
        texts = [text.split(stop)[0] if stop else text for text in texts]
        return [(clean_up(text) if cleans_up(self.tokenizer) else text).strip() for text in texts]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decode rows as the pipeline of transformers shows them, without the text that ends an answer."""
        texts = self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.removesuffix(self.end_sym) for text in texts]


def _deal(images: Images, prompts: Sequence[str]) -> list[list[ImageInput]]:
    """Return the images of each prompt."""
    given = flat_images(images) if images is None or isinstance(images, ImageInput) else list(images)
    flat = [each for each in given if isinstance(each, ImageInput)]
    if len(flat) < len(given):
        if len(given) != len(prompts):
            raise DataError(f"{len(given)} lists of images for {len(prompts)} prompts; give one list a prompt")
        return [[each] if isinstance(each, ImageInput) else list(each) for each in given]
    counts = [prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts]
    if sum(counts) != len(flat):
        raise DataError(
            f"the prompts hold {sum(counts)} times {IMAGE_PLACEHOLDER}, but there are {len(flat)} images; "
            "processor.prompt(question) and apply_chat_template place them"
        )
    remaining = iter(flat)
    return [[next(remaining) for _ in range(count)] for count in counts]
