"""The configuration of TinyGPT-V, a transformers config with one part each for ViT, Q-Former and Phi."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import AutoConfig, Blip2QFormerConfig, PhiConfig, PreTrainedConfig

from tinygptv_ds.remote_code import SavedWithCode

_Config = TypeVar("_Config", bound=PreTrainedConfig)


class EvaViTConfig(PreTrainedConfig):
    """EVA-CLIP ViT-g as BLIP-2 uses it (39 of its 40 blocks, no final norm).

    Args:
        image_size: side of the square input in pixels; position embeddings are interpolated to it when loading.
        patch_size: side of a patch in pixels.
        hidden_size: width.
        num_hidden_layers: blocks that are built; a checkpoint may hold more.
        num_attention_heads: heads.
        intermediate_size: width of the MLP.
    """

    model_type = "tinygptv_eva_vit"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        hidden_size: int = 1408,
        num_hidden_layers: int = 39,
        num_attention_heads: int = 16,
        intermediate_size: int = 6144,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        super().__init__(**kwargs)


PHI_2: dict[str, Any] = {
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "resid_pdrop": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
}


class TinyGPTVConfig(SavedWithCode, PreTrainedConfig):
    """EVA ViT + Q-Former + two linear projections + Phi with q/k and attention-output norms and LoRA.

    The defaults are the published model (3.9 B parameters).

    Args:
        vision_config: an `EvaViTConfig` or its fields.
        qformer_config: a `Blip2QFormerConfig` or its fields.
        text_config: a `PhiConfig` or its fields.
        num_query_tokens: rows an image takes in the sequence.
        proj_hidden_size: width between the two projections (4096, as in MiniGPT-4's).
        image_token_id: the token id at image positions; an unused row of the vocabulary, its last one by default.
        lora_r: LoRA rank on `lora_targets`; 0 builds the model without LoRA.
        lora_alpha: LoRA scale, `alpha / r`.
        lora_dropout: dropout before LoRA's A.
        lora_targets: linear layers of a Phi block that get LoRA.
        rotary_dtype: the dtype that cosines and sines of the rotary embedding are rounded to. The original loads Phi in
            fp16 and so builds its table in fp16, whatever it then computes in; the released weights were trained so.
        prompt_template: how a question was wrapped in training, with `{}` for the question; None: no wrap.
        end_sym: the text that ended every answer in training.
    """

    model_type = "tinygptv"

    def __init__(
        self,
        vision_config: dict | EvaViTConfig | None = None,
        qformer_config: dict | Blip2QFormerConfig | None = None,
        text_config: dict | PhiConfig | None = None,
        num_query_tokens: int = 32,
        proj_hidden_size: int = 4096,
        image_token_id: int | None = None,
        lora_r: int = 0,
        lora_alpha: float = 16,
        lora_dropout: float = 0.05,
        lora_targets: tuple[str, ...] = ("query_key_value", "dense"),
        rotary_dtype: str = "float16",
        prompt_template: str | None = None,
        end_sym: str = "###",
        **kwargs: Any,
    ) -> None:
        self.vision_config = _part(EvaViTConfig, vision_config, {})
        self.qformer_config = _part(
            Blip2QFormerConfig, qformer_config, {"encoder_hidden_size": self.vision_config.hidden_size}
        )
        self.text_config = _part(PhiConfig, text_config, PHI_2)
        self.text_config.qk_layernorm = True
        self.num_query_tokens = num_query_tokens
        self.proj_hidden_size = proj_hidden_size
        self.image_token_id = self.text_config.vocab_size - 1 if image_token_id is None else image_token_id
        self.lora_r = lora_r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.lora_targets = tuple(lora_targets)
        self.rotary_dtype = rotary_dtype
        self.prompt_template = prompt_template
        self.end_sym = end_sym
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name))
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    sub_configs = {  # noqa: RUF012 - transformers reads this class attribute
        "vision_config": EvaViTConfig,
        "qformer_config": Blip2QFormerConfig,
        "text_config": PhiConfig,
    }


def _part(kind: type[_Config], given: dict | _Config | None, default: dict) -> _Config:
    if given is None or isinstance(given, dict):
        return kind(**(default if given is None else given))
    return given


# AutoConfig and AutoTokenizer load an exported folder by this.
AutoConfig.register(TinyGPTVConfig.model_type, TinyGPTVConfig, exist_ok=True)
