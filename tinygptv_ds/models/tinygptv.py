"""TinyGPT-V: images through a frozen ViT and Q-Former, two linear projections, and Phi with norms and LoRA.

One model, two ways in. Training feeds packed rows (`cu_seqlens`), samples end to end without padding; generation feeds
padded `[batch, length]` rows with an `attention_mask` and a cache. Both agree.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Blip2QFormerModel,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinygptv_ds.models.attention import choose_backend, fused_sdpa, make_layout
from tinygptv_ds.models.auto_classes import NoSuchAutoModel
from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.eva_vit import build_eva_vit, call_replaced_layers
from tinygptv_ds.models.generation import ImageGenerationMixin, check_embedding_size
from tinygptv_ds.models.lora import LoRALinear
from tinygptv_ds.models.loss import PackedOutput, token_losses, with_loss
from tinygptv_ds.models.phi import PhiForCausalLM, RMSNorm
from tinygptv_ds.models.precision import compute_dtype, own_autocast, own_dtype
from tinygptv_ds.processing.image import IMAGE_MEAN, IMAGE_STD
from tinygptv_ds.processing.image_processor import TinyGPTVImageProcessor
from tinygptv_ds.processing.processor import TinyGPTVProcessor

# MKL multiplies fewer rows (below 28 with up to 16 threads, measured) by other kernels, which round differently. The
# published 32 queries are enough.
_FEWEST_ROWS = 32


class TinyGPTVForConditionalGeneration(PreTrainedModel, ImageGenerationMixin):
    """The whole model under its canonical parameter names.

    Top-level parts: `visual_encoder`, `ln_vision`, `query_tokens`, `qformer`, `llama_proj`, `llama_proj2` (the
    original's names for the projections) and `language_model`.
    """

    config: TinyGPTVConfig
    config_class = TinyGPTVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules = ["PhiBlock", "EvaBlock", "Blip2QFormerLayer"]  # noqa: RUF012 - read by transformers

    def __init__(self, config: TinyGPTVConfig) -> None:
        super().__init__(config)
        vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
        if qformer._attn_implementation not in (None, "eager"):  # the Q-Former of transformers has no FlashAttention
            qformer._attn_implementation = "sdpa"
        self.visual_encoder = build_eva_vit(vision)
        self.ln_vision = nn.LayerNorm(vision.hidden_size, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, qformer.hidden_size))
        self.qformer = Blip2QFormerModel(qformer)
        self.llama_proj = nn.Linear(qformer.hidden_size, config.proj_hidden_size)
        self.llama_proj2 = nn.Linear(config.proj_hidden_size, text.hidden_size)
        self.language_model = PhiForCausalLM(config)
        self.attention = "auto"
        self.always_run_vision = False
        self.recompute_vit = False  # in the backward pass, all blocks of a ViT that is trained
        self.frozen_updates: dict[str, Tensor] = {}  # frozen weights that are not those of the base models' files
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every module whose weights no file supplies, buffers that no file holds included.
        std = self.config.text_config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            nn.init.ones_(module.weight)
            if (bias := getattr(module, "bias", None)) is not None:  # RMSNorm has none
                nn.init.zeros_(bias)
        elif getattr(module, "k_bias", None) is not None:  # timm's EvaAttention: a buffer fixed at zero
            for name in ("q_bias", "k_bias", "v_bias"):
                nn.init.zeros_(getattr(module, name))
        elif getattr(module, "pos_embed", None) is not None:
            for name in ("pos_embed", "cls_token"):
                nn.init.normal_(getattr(module, name), std=std)
        elif isinstance(module, TinyGPTVForConditionalGeneration):
            nn.init.normal_(module.query_tokens, std=std)
        if isinstance(module, LoRALinear):
            module.reset_lora()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding of Phi."""
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding of Phi."""
        self.language_model.model.embed_tokens = cast(nn.Embedding, value)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the language-model head of Phi."""
        self.language_model.lm_head = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the language-model head of Phi."""
        return self.language_model.lm_head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize embedding and head of Phi; ValueError where there would be no row for the token of images."""
        check_embedding_size(self, new_num_tokens, pad_to_multiple_of)
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.language_model.model.gradient_checkpointing = self.recompute_vit = enable

    def train(self, mode: bool = True) -> TinyGPTVForConditionalGeneration:
        """Set the training mode; the frozen vision path stays in evaluation mode (no dropout), as in the original."""
        super().train(mode)
        for part in (self.visual_encoder, self.ln_vision, self.qformer):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    @property
    def vision_is_frozen(self) -> bool:
        """Whether nothing before the projections is trained."""
        return self._vit_is_frozen and self._qformer_is_frozen

    @property
    def _vit_is_frozen(self) -> bool:
        return not any(p.requires_grad for m in (self.visual_encoder, self.ln_vision) for p in m.parameters())

    @property
    def _qformer_is_frozen(self) -> bool:
        return not self.query_tokens.requires_grad and not any(p.requires_grad for p in self.qformer.parameters())

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """Normalise uint8 `[N, 3, S, S]` to fp32; floats are returned as they are."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        mean, std = (_by_channel(values, pixel_values.device) for values in (IMAGE_MEAN, IMAGE_STD))
        return (pixel_values.float() / 255 - mean) / std

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Run ViT and Q-Former: `[N, 3, S, S]` (uint8, or normalised floats) to `[N, queries, Q-Former width]`.

        Frozen 16-bit weights compute alike inside autocast and out of it, in training, `features` and generation. On a
        CPU in fp32 an image gives the same bits in any batch, with any number of threads (seen for widths that 32
        divides, 1 to 16 threads).
        """
        call_replaced_layers(self.visual_encoder)
        count, device = len(pixel_values), pixel_values.device
        vit_frozen, qformer_frozen = self._vit_is_frozen, self._qformer_is_frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (vit_frozen and qformer_frozen)):
            dtype = self.visual_encoder.patch_embed.proj.weight.dtype
            pixels = self.normalize(pixel_values).to(dtype)
            pixels = F.pad(pixels, (0, 0) * 3 + (0, max(0, self._fewest_images() - count)))
            # Only where there is a backward pass through it: it saves the state of the random numbers at every block.
            recompute = self.recompute_vit and self.training and torch.is_grad_enabled()
            self.visual_encoder.set_grad_checkpointing(recompute and not vit_frozen)
            vision = self.config.vision_config
            head_dim = vision.hidden_size // vision.num_attention_heads
            with own_dtype(device, dtype, frozen=vit_frozen), fused_sdpa(device, head_dim):
                patches = self.ln_vision(self.visual_encoder.forward_features(pixels))
            queries = self.query_tokens.expand(len(patches), -1, -1)
            with own_autocast(device, queries.dtype, frozen=qformer_frozen):
                features = self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
            return features[:count].to(queries.dtype)

    def _fewest_images(self) -> int:
        """Return how many images give every matrix product `_FEWEST_ROWS` rows: more than one in tiny models."""
        vision = self.config.vision_config
        rows = min(self.config.num_query_tokens, (vision.image_size // vision.patch_size) ** 2)
        return -(-_FEWEST_ROWS // rows)

    def project(self, features: Tensor) -> Tensor:
        """Project `[N, queries, Q-Former width]` to `[N, queries, LLM width]`, without an activation in between."""
        return self.llama_proj2(self.llama_proj(features.to(compute_dtype(self.llama_proj.bias))))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return what the language model sees of images: `[N, 3, S, S]` to `[N, queries, LLM width]`."""
        return self.project(self.encode_vision(pixel_values))

    def _image_embeds(
        self, pixel_values: Tensor | None, image_features: Tensor | None, device: torch.device
    ) -> tuple[Tensor, bool]:
        """Return projected images `[N, queries, width]`, and whether they are real.

        Without an image, zeros still pass through the projections, and with `always_run_vision` (under ZeRO-3, or where
        ViT or Q-Former are trained) a black image through the ViT: every rank must take part in the same gathers and
        reductions, in the same order. For the same reason no weight is touched before its turn, not even for its
        device: under ZeRO-3 that gathers it. When training from features, no rank runs the ViT.
        """
        if image_features is not None and len(image_features):
            return self.project(image_features), True
        if pixel_values is not None and len(pixel_values):
            return self.project(self.encode_vision(pixel_values)), True
        if self.always_run_vision and image_features is None:
            size = self.config.vision_config.image_size
            features = self.encode_vision(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
        else:
            shape = (1, self.config.num_query_tokens, self.config.qformer_config.hidden_size)
            features = torch.zeros(shape, device=device)
        return self.project(features), False

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        image_rows: Tensor | None = None,
        image_index: Tensor | None = None,
        target_rows: Tensor | None = None,
        targets: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        embed_only: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> PackedOutput | CausalLMOutputWithPast | Tensor | tuple:
        """Run the model on a packed row (with `cu_seqlens`, for training) or on padded rows (for generation).

        Args:
            input_ids: int64 `[T]` packed or `[B, L]` padded; image positions hold `config.image_token_id`.
            pixel_values: `[N, 3, S, S]`, uint8 or normalised; images in the order of their positions.
            image_features: `[N, queries, Q-Former width]` instead of pixels; N may be 0.
            position_ids: int64, shape of `input_ids`; may skip.
            cu_seqlens: int32 `[samples + 1]`, boundaries of the packed samples.
            max_seqlen: length of the longest packed sample.
            image_rows: int64 `[R]`, packed only: the positions of image rows.
            image_index: int64 `[R]`, packed only: which of the N * queries image rows go there; None: all, in order.
            target_rows: int64 `[K]`, packed only: rows whose output predicts a target.
            targets: int64 `[K]`: the tokens to predict.
            dropout_keys: int64, shape of `input_ids`, for dropout's masks in training; None: of torch's generator.
            attention_mask: `[B, keys]`, 1 for real positions.
            inputs_embeds: `[B, L, W]` instead of `input_ids`.
            cache: keys and values of earlier tokens.
            past_key_values: the older name of `cache`.
            use_cache: keep keys and values for the next call.
            logits_to_keep: logits of the last n positions only, or of the positions int64 `[n]`; 0 for all.
            embed_only: padded only: end with the embeddings `[B, L, W]`; see `embed`.
            labels: int64 `[B, L]`, padded only: the output gets a `loss`; -100 where none is wanted.
            num_items_in_batch: what that loss is divided by instead of the number of its tokens.
            output_hidden_states: padded only: also return the inputs of all blocks and the final hidden states.
            output_attentions: padded only: also return the attention weights of all blocks, as "eager" computes them.
            return_dict: padded only: false for a tuple.

        Raises:
            ValueError: an input is missing, the backend computes no attention weights, or images and positions differ.
        """
        if cu_seqlens is not None:
            if input_ids is None:
                raise ValueError("packed rows need input_ids")
            return self._forward_packed(
                input_ids,
                position_ids,
                cu_seqlens,
                max_seqlen,
                self._image_embeds(pixel_values, image_features, input_ids.device),
                (image_rows, image_index),
                (target_rows, targets),
                dropout_keys,
            )
        if inputs_embeds is None:
            inputs_embeds = self._embeds(input_ids, pixel_values, image_features)
        if embed_only:
            return inputs_embeds
        if labels is not None:
            self.check_images(input_ids, pixel_values, image_features)
        kept = (past_key_values if cache is None else cache, use_cache, logits_to_keep)
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        states = {name: bool(getattr(self.config, name) if given is None else given) for name, given in wanted.items()}
        output = self._forward_padded(inputs_embeds, attention_mask, position_ids, *kept, dropout_keys, states)
        output = output if labels is None else with_loss(output, labels, num_items_in_batch)
        return output.to_tuple() if return_dict is False else output

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_features: Tensor | None = None
    ) -> Tensor:
        """Embed `[B, L]` with images as in `forward` to `[B, L, W]`, which `generate` takes as `inputs_embeds`.

        This calls `forward`, since ZeRO-3 gathers weights for nothing else.
        """
        return self(input_ids, pixel_values=pixel_values, image_features=image_features, embed_only=True)

    def _embeds(self, input_ids: Tensor | None, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor:
        if input_ids is None:
            raise ValueError("padded rows need input_ids or inputs_embeds")
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None and image_features is None:
            return embeds
        images, real = self._image_embeds(pixel_values, image_features, embeds.device)
        place = input_ids == self.config.image_token_id
        rows, places = len(images) * self.config.num_query_tokens if real else 0, int(place.sum())
        if rows != places:
            raise ValueError(f"the images give {rows} rows, but input_ids has {places} places for them")
        # Parts of the model may be on several devices (`device_map`).
        return embeds.masked_scatter(place.unsqueeze(-1).to(embeds.device), images.to(embeds))

    def _forward_packed(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        images: tuple[Tensor, bool],
        place: tuple[Tensor | None, Tensor | None],
        target: tuple[Tensor | None, Tensor | None],
        dropout_keys: Tensor | None,
    ) -> PackedOutput:
        target_rows, targets = target
        if position_ids is None or max_seqlen is None or target_rows is None or targets is None:
            raise ValueError("packed rows need input_ids, position_ids, max_seqlen, target_rows and targets")
        image_embeds, real = images
        anchor = image_embeds.float().sum() * 0.0
        x = self.get_input_embeddings()(input_ids)
        if real:
            image_rows, image_index = place
            if image_rows is None:
                raise ValueError("packed rows with images need image_rows")
            rows = image_embeds.flatten(0, 1).to(x.dtype)
            x = x.index_copy(0, image_rows, rows if image_index is None else rows[image_index])
        else:
            # The first block's input has a gradient with an image, so without one too: else ZeRO-3 lets that block's
            # weights go at other times on this rank, and from then on the ranks gather different ones together.
            x = x + anchor.to(x.dtype)
        backend = choose_backend(self.attention, x.device, compute_dtype(x))
        layout = make_layout(cu_seqlens, max_seqlen, len(input_ids), backend)
        hidden = self.language_model.model(x, position_ids, layout=layout, dropout_keys=dropout_keys)
        logits = self.language_model.lm_head(hidden.index_select(0, target_rows))
        losses = token_losses(logits, targets)
        return PackedOutput(losses, anchor)

    def _forward_padded(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        dropout_keys: Tensor | None,
        states: dict[str, bool],
    ) -> CausalLMOutputWithPast:
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.text_config)
        phi = self.language_model.model
        hidden = phi.padded(inputs_embeds, attention_mask, position_ids, cache, dropout_keys, **states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(hidden.last[:, kept])
        attentions: Any = hidden.weights  # none of them is None
        output = CausalLMOutputWithPast(None, logits.float(), cache, hidden.all, attentions)
        # An attribute, not a field: TRL takes it from `base_model`, which is the model itself, and applies the head.
        output.last_hidden_state = hidden.last
        return output


def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return fp32 `[3, 1, 1]`, filled on the device: a copy from the host would wait for all work queued there."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


# transformers' Auto classes load an exported folder by these.
AutoModelForImageTextToText.register(TinyGPTVConfig, TinyGPTVForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(TinyGPTVConfig, TinyGPTVForConditionalGeneration, exist_ok=True)
AutoModel.register(TinyGPTVConfig, NoSuchAutoModel, exist_ok=True)
AutoModelForCausalLM.register(TinyGPTVConfig, NoSuchAutoModel, exist_ok=True)
AutoProcessor.register(TinyGPTVConfig, TinyGPTVProcessor, exist_ok=True)
_BY_BACKEND: dict[str, type] = dict.fromkeys(("pil", "torchvision"), TinyGPTVImageProcessor)
AutoImageProcessor.register(TinyGPTVConfig, image_processor_classes=_BY_BACKEND, exist_ok=True)
