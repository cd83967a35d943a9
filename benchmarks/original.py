"""The original's forward pass on the modules of our model, so that weights and matrix products are the same.

Samples are padded on the right to the longest; attention is plain matrix products with an additive mask and a softmax
in fp32; the logits of all rows are computed, in fp32, and the loss uses those with a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygptv_ds.data.loader.batch import Batch
from tinygptv_ds.models import phi
from tinygptv_ds.models.attention import causal_mask, make_layout
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.processing.sequence import IGNORE


@dataclass(frozen=True)
class PaddedBatch:
    """A batch in padded rows, on the host.

    Attributes:
        ids: int64 `[B, L]`.
        positions: int64 `[B, L]`.
        labels: int64 `[B, L]`, of the tokens at these places; -100 without a loss.
        mask: `[B, L]`, 1 for real tokens.
        pixels: fp32 `[N, 3, S, S]`, normalised; None where images come as features.
        features: fp32 `[N, Q, width]`; None where they come as pixels.
        image_rows: int64 `[R]`, places of image rows among `B * L`.
        image_index: int64 `[R]`, which rows of the images go there.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    pixels: Tensor | None
    features: Tensor | None
    image_rows: Tensor
    image_index: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        """Copy to a device; the host waits for each tensor."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return PaddedBatch(**{"pixels": None, "features": None, **moved})


def padded(batch: Batch, normalize: Callable[[Tensor], Tensor]) -> PaddedBatch:
    """Return a packed batch in padded rows."""
    lengths, longest = batch.cu_seqlens.diff(), int(batch.max_seqlen)
    place = make_layout(batch.cu_seqlens, longest, len(batch.input_ids), "sdpa").padded_rows
    assert place is not None
    index = torch.arange(len(batch.image_rows)) if batch.image_index is None else batch.image_index
    labels = torch.full((len(batch.input_ids),), IGNORE)
    labels[batch.target_rows + 1] = batch.targets

    def rows(values: Tensor, filling: int) -> Tensor:
        filled = torch.full((len(lengths) * longest,), filling, dtype=values.dtype).index_copy(0, place, values)
        return filled.view(len(lengths), longest)

    return PaddedBatch(
        rows(batch.input_ids, 0),
        rows(batch.position_ids, 0),
        rows(labels, IGNORE),
        (torch.arange(longest) < lengths[:, None]).long(),
        normalize(batch.pixel_values) if batch.image_features is None else None,
        batch.image_features,
        place[batch.image_rows],
        index,
    )


def eager_attention(
    _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _implementation: str
) -> tuple[Tensor, None]:
    """Attend by plain matrix products, with an additive mask and a softmax in fp32; see `padded_attention`."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores + mask
    return (scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2), None


@contextmanager
def as_the_original(model: TinyGPTVForConditionalGeneration) -> Iterator[None]:
    """Have the model attend eagerly, and draw dropout from torch's generator."""
    config = model.qformer.config  # its property cannot be patched
    before = config._attn_implementation
    with ExitStack() as stack:
        for block in model.visual_encoder.get_submodule("blocks").children():
            stack.enter_context(patch.dict(vars(block.get_submodule("attn")), fused_attn=False))
        stack.enter_context(patch.object(phi, "padded_attention", eager_attention))
        stack.enter_context(patch.object(model.language_model.model, "_dropout", lambda *_: None))
        config._attn_implementation = "eager"
        try:
            yield
        finally:
            config._attn_implementation = before


def mean_loss(model: TinyGPTVForConditionalGeneration, batch: PaddedBatch) -> Tensor:
    """Return the mean loss of a batch on the device, a scalar with a graph."""
    features = _encode(model, batch.pixels) if batch.features is None else batch.features
    images = model.llama_proj2(model.llama_proj(features)).flatten(0, 1)
    embeds = model.get_input_embeddings()(batch.ids)
    flat = embeds.flatten(0, 1).index_copy(0, batch.image_rows, images[batch.image_index].to(embeds.dtype))
    seen = causal_mask(batch.mask, batch.ids.shape[1])
    mask = torch.where(seen, 0.0, torch.finfo(embeds.dtype).min).to(embeds.dtype)
    hidden = model.language_model.model(flat.view_as(embeds), batch.positions, mask=mask)
    logits = model.language_model.lm_head(hidden).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE)


@torch.no_grad()
def _encode(model: TinyGPTVForConditionalGeneration, pixels: Tensor | None) -> Tensor:
    assert pixels is not None
    patches = model.visual_encoder.forward_features(pixels.to(model.visual_encoder.patch_embed.proj.weight.dtype))
    queries = model.query_tokens.expand(len(patches), -1, -1)
    return model.qformer(query_embeds=queries, encoder_hidden_states=model.ln_vision(patches)).last_hidden_state
