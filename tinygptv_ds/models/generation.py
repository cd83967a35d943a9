"""What `generate` of transformers needs to know of a model whose prompts have images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from tinygptv_ds.models.configuration import TinyGPTVConfig

_HIGHEST_PIXEL = 10  # normalized ones are at most 2.2


class ImageGenerationMixin(GenerationMixin):  # transformers looks for "GenerationMixin" in the names of a model's bases
    """Generation from rows with image positions, whose images go with the first step."""

    config: TinyGPTVConfig

    def check_images(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, image_features: Tensor | None
    ) -> None:
        """Raise ValueError where images are missing, or are pixels of 0 to 255 as floats; this waits for the device."""
        if torch.compiler.is_compiling():
            return
        if pixel_values is not None:
            if pixel_values.is_floating_point() and bool((pixel_values > _HIGHEST_PIXEL).any()):
                raise ValueError(
                    "pixel_values: floats must be normalized; leave the uint8 of the processor as they are"
                )
        elif image_features is None and input_ids is not None:
            places = int((input_ids == self.config.image_token_id).sum())
            if places:
                raise ValueError(f"input_ids has {places} places for images, but there is no pixel_values")

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **given: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeat each row for every beam with all its images in order; transformers would repeat each image alone."""
        seen = {name: given.pop(name) for name in ("pixel_values", "image_features") if given.get(name) is not None}
        rows, expanded = super()._expand_inputs_for_generation(  # type: ignore[misc]  # its `self` is a protocol
            expand_size, is_encoder_decoder, input_ids, **given
        )
        if expand_size > 1 and seen and input_ids is not None:
            places = (input_ids == self.config.image_token_id).sum(1) // self.config.num_query_tokens
            for name, images in seen.items():
                of_rows = images.split(places.tolist())
                seen[name] = torch.cat([torch.cat([row] * expand_size) for row in of_rows])
        return rows, expanded | seen

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of the next step: first the whole prompt with its images, then the tokens not yet seen.

        transformers takes `kwargs` by its name to mean all that `forward` takes.
        """
        past = int(cache.get_seq_length()) if cache is not None else 0
        step: dict[str, Any] = {"cache": cache, "attention_mask": attention_mask}
        step |= {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        if past == 0 and inputs_embeds is not None:
            step["inputs_embeds"] = inputs_embeds
        else:
            # With embeddings as the prompt, `input_ids` holds the new tokens alone.
            step["input_ids"] = input_ids[:, past:] if input_ids.shape[1] > past else input_ids[:, -1:]
        if past == 0:
            self.check_images(step.get("input_ids"), pixel_values, image_features)
            step |= {"pixel_values": pixel_values, "image_features": image_features}
        return step | {"use_cache": True, "logits_to_keep": 1}


def check_embedding_size(model: PreTrainedModel, tokens: int | None, multiple: int | None) -> None:
    """Raise ValueError where an embedding of so many tokens, rounded up to a multiple, has none for images."""
    if tokens is None:
        return
    least, size = model.config.image_token_id + 1, -(-tokens // (multiple or 1)) * (multiple or 1)
    if size < least:
        rows = model.config.text_config.vocab_size
        raise ValueError(
            f"resize_token_embeddings({tokens}): the token of images is {least - 1}, so {least} rows are the least. "
            f"There are {rows} already, in which tokens that are added to the tokenizer have room without a resize"
        )
