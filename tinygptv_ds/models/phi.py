"""Phi-2 with TinyGPT-V's additions: q/k LayerNorms, an RMSNorm on the attention output, LoRA on fused qkv.

Block (parallel attention and MLP on one shared norm, TinyGPT-V, arXiv 2312.16862):
`h = input_layernorm(x); x + dropout(post_layernorm(attention(h))) + dropout(mlp(h))`.

A block is two functions around its attention, `before_attention` and `after_attention`; each can be compiled as
one graph (regions.py). What is between them depends on attention backend, number of samples and cache.

Shapes: T tokens of a packed row, or B x L padded ones; H heads of D dimensions; W = H * D the width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import PhiConfig
from transformers.cache_utils import Cache

from tinygptv_ds.models.attention import PackedLayout, padded_attention, padded_mask, varlen_attention
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.dropout import DropoutKeys, TokenDropout, make_keys
from tinygptv_ds.models.lora import LoRALinear, LoRAWeights, cast_lora
from tinygptv_ds.models.precision import compute_dtype

RMS_NORM_EPS = 1e-6
# The places of dropout in a block, numbered.
_SITES = ("attention", "mlp", "query_key_value", "dense", "fc1", "fc2")

LoRACasts = Mapping[int, LoRAWeights]  # of one block, by site; see `cast_lora`


@dataclass(frozen=True)
class AttentionContext:
    """The inputs that all layers of one forward pass share, apart from the hidden states.

    Attributes:
        cos: cosines of the rotary embedding, fp32 `[..., rotary dims]` of each position.
        sin: sines, as `cos`.
        layout: set for packed rows.
        mask: set for padded rows, from `padded_mask`; bool `[B, 1, L, keys]` for SDPA.
        implementation: of attention in padded rows, as transformers names it.
        weights: gets the attention weights of each layer, where they are asked for.
        cache: keys and values of earlier tokens, for generation with padded rows.
        dropout: the keys of dropout, in training; a block sees those of its own places.
        lora: a block's LoRA weights, where all blocks' have been cast together.
    """

    cos: Tensor
    sin: Tensor
    layout: PackedLayout | None = None
    mask: Tensor | BlockMask | None = None
    implementation: str = "sdpa"
    weights: list[Tensor | None] | None = None
    cache: Cache | None = None
    dropout: DropoutKeys | None = None
    lora: LoRACasts | None = None

    def to(self, device: torch.device, **_: object) -> AttentionContext:
        """Return the same on a device; accelerate calls this for a block on another one than the block before it."""
        mask = None if self.mask is None else self.mask.to(device)
        keys = None if self.dropout is None else self.dropout.to(device)
        return replace(self, cos=self.cos.to(device), sin=self.sin.to(device), mask=mask, dropout=keys)


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in fp32, output in the input's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension: `[..., width]` to the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), RMS_NORM_EPS).to(x.dtype)


def rotary_tables(position_ids: Tensor, config: PhiConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[..., rotary dims]` for integer positions `[...]`, in fp32 but rounded to `dtype`."""
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    head_dim = config.hidden_size // config.num_attention_heads
    dims = int(head_dim * rope["partial_rotary_factor"])
    exponent = torch.arange(0, dims, 2, dtype=torch.float32, device=position_ids.device) / dims
    angles = position_ids[..., None].float() / rope["rope_theta"] ** exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype).float(), angles.sin().to(dtype).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of every head, half against half; the rest passes through.

    Args:
        x: `[..., H, D]`.
        cos: `[..., rotary dims]`.
        sin: as `cos`.
    """
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.float().chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    turned = turned.float() * cos.unsqueeze(-2) + swapped * sin.unsqueeze(-2)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def _linear(config: TinyGPTVConfig, name: str, width_in: int, width_out: int) -> nn.Linear:
    if config.lora_r and name in config.lora_targets:
        return LoRALinear(
            width_in,
            width_out,
            lora_r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            dropout_site=_SITES.index(name),
        )
    return nn.Linear(width_in, width_out)


def _apply(linear: nn.Module, x: Tensor, keys: DropoutKeys | None, lora: LoRACasts | None) -> Tensor:
    if not isinstance(linear, LoRALinear):
        return linear(x)
    return linear(x, keys, None if lora is None else lora[linear.dropout.site])


class PhiAttention(nn.Module):
    """Attention with fused qkv, rows ordered [heads, 3, head_dim], and LayerNorms over head_dim before the rotation."""

    def __init__(self, config: TinyGPTVConfig, layer: int) -> None:
        super().__init__()
        text = config.text_config
        self.layer = self.layer_idx = layer
        self.config = text  # with `is_causal` and `layer_idx`, what transformers' attention functions look at
        self.is_causal = True
        self.heads = text.num_attention_heads
        self.head_dim = text.hidden_size // self.heads
        self.query_key_value = _linear(config, "query_key_value", text.hidden_size, 3 * text.hidden_size)
        self.dense = _linear(config, "dense", text.hidden_size, text.hidden_size)
        self.q_layernorm = nn.LayerNorm(self.head_dim, eps=text.layer_norm_eps)
        self.k_layernorm = nn.LayerNorm(self.head_dim, eps=text.layer_norm_eps)

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: DropoutKeys | None, lora: LoRACasts | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries, rotated keys, and values, each `[..., H, D]`, of normalised `[..., W]`."""
        qkv = _apply(self.query_key_value, x, keys, lora).unflatten(-1, (self.heads, 3, self.head_dim))
        q, k, v = qkv.unbind(-2)
        return rotate(self.q_layernorm(q).to(v.dtype), cos, sin), rotate(self.k_layernorm(k).to(v.dtype), cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Attend: `[T, H, D]` packed or `[B, L, H, D]` padded, to `[..., W]`."""
        if context.layout is not None:
            return varlen_attention(q, k, v, context.layout).flatten(-2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.layer)
        out, weights = padded_attention(self, q, k, v, context.mask, context.implementation)
        if context.weights is not None:
            context.weights.append(weights)
        return out.flatten(-2)


class PhiMLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU ("gelu_new")."""

    def __init__(self, config: TinyGPTVConfig) -> None:
        super().__init__()
        text = config.text_config
        self.fc1 = _linear(config, "fc1", text.hidden_size, text.intermediate_size)
        self.fc2 = _linear(config, "fc2", text.intermediate_size, text.hidden_size)

    def forward(self, x: Tensor, keys: DropoutKeys | None, lora: LoRACasts | None) -> Tensor:
        """Apply both layers: `[..., W]` to the same shape."""
        return _apply(self.fc2, F.gelu(_apply(self.fc1, x, keys, lora), approximate="tanh"), keys, lora)


class PhiBlock(nn.Module):
    """One layer: attention and MLP in parallel, on one shared LayerNorm.

    Attributes:
        regions: what runs before and after the attention of packed rows: the two functions below, or compiled ones.
    """

    def __init__(self, config: TinyGPTVConfig, layer: int) -> None:
        super().__init__()
        text = config.text_config
        self.self_attn = PhiAttention(config, layer)
        self.mlp = PhiMLP(config)
        self.input_layernorm = nn.LayerNorm(text.hidden_size, eps=text.layer_norm_eps)
        self.post_layernorm = RMSNorm(text.hidden_size)
        self.attention_dropout = TokenDropout(text.resid_pdrop, _SITES.index("attention"))
        self.mlp_dropout = TokenDropout(text.resid_pdrop, _SITES.index("mlp"))
        self.regions: tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]] = _REGIONS

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Apply the block: `[..., W]` to the same shape."""
        # Padded rows grow token by token, each batch of them in other shapes.
        before, after = _REGIONS if context.layout is None else self.regions
        h, q, k, v = before(self, x, context.cos, context.sin, context.dropout, context.lora)
        return after(self, x, h, self.self_attn.attend(q, k, v, context), context.dropout, context.lora)

    def lora_layers(self) -> list[LoRALinear]:
        """Return the layers with LoRA."""
        linears = (self.self_attn.query_key_value, self.self_attn.dense, self.mlp.fc1, self.mlp.fc2)
        return [linear for linear in linears if isinstance(linear, LoRALinear)]


def before_attention(
    block: PhiBlock, x: Tensor, cos: Tensor, sin: Tensor, keys: DropoutKeys | None, lora: LoRACasts | None
) -> tuple[Tensor, ...]:
    """Return a block's normalised input `[..., W]`, rotated queries and keys, and values, `[..., H, D]`."""
    h = block.input_layernorm(x).to(x.dtype)
    return h, *block.self_attn.project(h, cos, sin, keys, lora)


def after_attention(
    block: PhiBlock, x: Tensor, h: Tensor, attended: Tensor, keys: DropoutKeys | None, lora: LoRACasts | None
) -> Tensor:
    """Return a block's output `[..., W]`.

    Args:
        block: the block.
        x: its input, `[..., W]`.
        h: its normalised input.
        attended: the attention's output.
        keys: those of the block's dropout, in training.
        lora: the block's LoRA weights, where they have been cast.
    """
    attention = block.post_layernorm(_apply(block.self_attn.dense, attended, keys, lora))
    attention = block.attention_dropout(attention, keys)
    return x + attention.to(x.dtype) + block.mlp_dropout(block.mlp(h, keys, lora), keys).to(x.dtype)


_REGIONS = (before_attention, after_attention)


class PaddedStates(NamedTuple):
    """What `PhiModel.padded` returns.

    Attributes:
        last: `[B, L, W]`, after the final norm.
        all: the inputs of all blocks and `last`, if they were asked for.
        weights: the attention weights of each layer `[B, H, L, keys]`, if they were asked for.
    """

    last: Tensor
    all: tuple[Tensor, ...] | None
    weights: tuple[Tensor | None, ...] | None


class PhiModel(nn.Module):
    """Embeddings, blocks and the final norm.

    Attributes:
        gradient_checkpointing: N: every N-th block is recomputed in the backward pass; 0: none.
        cast_lora_together: under autocast, cast the LoRA weights of all blocks at once in training. Their gradients
            then come at the end of the backward pass: for a single rank, which sends none of them meanwhile.
    """

    def __init__(self, config: TinyGPTVConfig) -> None:
        super().__init__()
        text = config.text_config
        self.text_config = text
        self.rotary_dtype = getattr(torch, config.rotary_dtype)
        self._drops = text.resid_pdrop > 0 or (config.lora_r > 0 and config.lora_dropout > 0)
        self.gradient_checkpointing = 0
        self.cast_lora_together = False
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(PhiBlock(config, layer) for layer in range(text.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(text.hidden_size, eps=text.layer_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        *,
        layout: PackedLayout | None = None,
        mask: Tensor | BlockMask | None = None,
        implementation: str = "sdpa",
        weights: list[Tensor | None] | None = None,
        cache: Cache | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm, in the shape of `inputs_embeds`.

        Args:
            inputs_embeds: `[T, W]` with `layout`, or `[B, L, W]` with `mask`.
            position_ids: int64, `[T]` or `[B, L]`.
            layout: the boundaries of packed samples.
            mask: from `padded_mask`; bool `[B, 1, L, keys]` for SDPA.
            implementation: of attention in padded rows.
            weights: a list that gets the attention weights of each layer; None with others than "eager".
            cache: earlier keys and values; the new ones are appended.
            dropout_keys: int64, shape of `position_ids`, a key of each token; None: drawn from torch's generator.
        """
        cos, sin = rotary_tables(position_ids, self.text_config, self.rotary_dtype)
        keys = self._dropout(dropout_keys, position_ids)
        context = AttentionContext(cos, sin, layout, mask, implementation, weights, cache, keys)
        x = inputs_embeds
        every = int(self.gradient_checkpointing) if self.training else 0
        casts = self._cast_lora(compute_dtype(x))
        for number, layer in enumerate(self.layers):
            if casts is not None:
                context = replace(context, lora=casts[number])
            if keys is not None:
                context = replace(context, dropout=keys.at(slice(number * len(_SITES), (number + 1) * len(_SITES))))
            if every and number % every == 0:
                # Recomputed, dropout has the same masks without saved state.
                x = checkpoint(layer, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, context)
        return self.final_layernorm(x).to(x.dtype)

    def padded(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        dropout_keys: Tensor | None,
        *,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> PaddedStates:
        """Run padded rows `[B, L, W]`; the arguments are those of the whole model's `forward`.

        Raises:
            ValueError: attention weights are asked for, which only the "eager" implementation computes.
        """
        implementation = self.text_config._attn_implementation or "sdpa"
        if output_attentions and implementation != "eager":
            raise ValueError(
                f"output_attentions: {implementation!r} computes no attention weights; load the model with "
                'attn_implementation="eager", or call set_attn_implementation("eager")'
            )
        batch, length = inputs_embeds.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, dtype=torch.long, device=inputs_embeds.device)
        attention_mask = attention_mask.to(inputs_embeds.device)  # parts of the model may be on several devices
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        position_ids = position_ids.to(inputs_embeds.device)
        mask = padded_mask(self.text_config, implementation, inputs_embeds, attention_mask, cache, position_ids)
        seen: list[Tensor] = []
        weights: list[Tensor | None] | None = [] if output_attentions else None
        watched = self.layers if output_hidden_states else ()
        hooks = [block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for block in watched]
        try:
            hidden = self(
                inputs_embeds,
                position_ids,
                mask=mask,
                implementation=implementation,
                weights=weights,
                cache=cache,
                dropout_keys=dropout_keys,
            )
        finally:
            for hook in hooks:
                hook.remove()
        states = (*seen, hidden) if output_hidden_states else None
        return PaddedStates(hidden, states, None if weights is None else tuple(weights))

    def _cast_lora(self, dtype: torch.dtype) -> list[dict[int, LoRAWeights]] | None:
        if not self.cast_lora_together or not self.training:
            return None
        blocks = [layer.lora_layers() for layer in self.layers]  # type: ignore[operator]  # torch types them as Module
        if not any(blocks) or blocks[0][0].lora_A.weight.dtype == dtype:
            return None
        return cast_lora(blocks, dtype)

    def _dropout(self, token_keys: Tensor | None, position_ids: Tensor) -> DropoutKeys | None:
        if not self.training or not self._drops:
            return None
        if token_keys is None:
            token_keys = torch.randint(-(2**63), 2**63 - 1, position_ids.shape, device=position_ids.device)
        width = max(self.text_config.hidden_size, self.text_config.intermediate_size)
        return make_keys(token_keys, len(self.layers) * len(_SITES), width)


class PhiForCausalLM(nn.Module):
    """Phi with its language-model head, untied and with a bias."""

    def __init__(self, config: TinyGPTVConfig) -> None:
        super().__init__()
        self.model = PhiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size)
