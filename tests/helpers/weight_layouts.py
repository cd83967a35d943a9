"""The weights of a tiny model in every layout that is read, and trained weights loaded into a model."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tinygptv_ds.models.configuration import TinyGPTVConfig
from tinygptv_ds.models.parameters import lora
from tinygptv_ds.weights.io import in_memory
from tinygptv_ds.weights.layouts import blip2
from tinygptv_ds.weights.layouts.phi2 import ADDED_NORMS, to_layout, unfuse_remote
from tinygptv_ds.weights.source import copy_weights
from tinygptv_ds.weights.trained import fitting_source

HEADS, WIDTH, VOCABULARY = 2, 12, 20
PHI = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "resid_pdrop": 0.1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 9,
    "eos_token_id": 9,
    "max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
}
_OLD_NAMES = (
    ("model.embed_tokens.", "transformer.embd.wte."),
    ("model.final_layernorm.", "lm_head.ln."),
    ("model.layers.", "transformer.h."),
    ("self_attn.query_key_value.", "mixer.Wqkv."),
    ("self_attn.dense.", "mixer.out_proj."),
    ("input_layernorm.", "ln."),
)


def tiny_config(lora_r: int = 3) -> TinyGPTVConfig:
    text = {key: value for key, value in PHI.items() if key != "partial_rotary_factor"}
    return TinyGPTVConfig(
        vision_config={
            "image_size": 28,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 10,
        },
        qformer_config={
            "hidden_size": 6,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "encoder_hidden_size": 8,
        },
        text_config=text
        | {
            "pad_token_id": 9,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        num_query_tokens=3,
        proj_hidden_size=5,
        lora_r=lora_r,
        lora_alpha=6,
    )


def phi_state(values: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Return what a Phi-2 file of this layout holds."""
    base = {
        name: tensor
        for name, tensor in values.items()
        if name.startswith("language_model.") and not lora(name) and not ADDED_NORMS.fullmatch(name)
    }
    if layout == "split":
        split = to_layout({name: in_memory(tensor) for name, tensor in base.items()}, HEADS, "split")
        return {name: stored.read().clone() for name, stored in split.items()}
    state = {}
    for name, tensor in base.items():
        name = name.removeprefix("language_model.")
        if layout == "remote":
            tensor = unfuse_remote(tensor, HEADS) if "query_key_value" in name else tensor
            name = name.replace("lm_head.", "lm_head.linear.")
            for new, old in _OLD_NAMES:
                name = name.replace(new, old)
        state[name] = tensor.clone()
    return state


def blip2_state(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under LAVIS's names, with some of the other tensors in the real file."""
    parts = ("qformer.", "ln_vision.", "query_tokens")
    state = {blip2.original_name(name): tensor for name, tensor in values.items() if name.startswith(parts)}
    extra = (
        "Qformer.bert.embeddings.word_embeddings.weight",
        "Qformer.bert.embeddings.position_embeddings.weight",
        "Qformer.bert.embeddings.position_ids",
        "Qformer.bert.encoder.layer.0.intermediate.dense.weight",
        "Qformer.bert.encoder.layer.0.output.LayerNorm.bias",
        "Qformer.cls.predictions.bias",
        "t5_proj.weight",
        "visual_encoder.cls_token",
    )
    return state | {name: torch.zeros(2) for name in extra}


def eva_state(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tower with one more block, a norm and a head, as in the published file."""
    prefix = "visual_encoder."
    state = {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)}
    more = {name.replace("blocks.1.", "blocks.2."): t.clone() for name, t in state.items() if "blocks.1." in name}
    extra = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    return state | more | {name: torch.zeros(2) for name in extra}


def save_phi(folder: Path, state: dict[str, Tensor], container: str = "one safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PHI))
    tokenizer().save_pretrained(folder)
    many, kind = container.startswith("many"), container.split()[1]
    suffix, stem = ("safetensors", "model") if kind == "safetensors" else ("bin", "pytorch_model")
    names = list(state)
    pieces = [names[::2], names[1::2]] if many else [names]
    weight_map = {}
    for number, piece in enumerate(pieces, 1):
        file = f"{stem}-{number:05}-of-{len(pieces):05}.{suffix}" if many else f"{stem}.{suffix}"
        save = save_file if suffix == "safetensors" else torch.save
        save({name: state[name].contiguous() for name in piece}, folder / file)
        weight_map |= dict.fromkeys(piece, file)
    if many:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def load_into(model: nn.Module, path: Path, allow_missing: Collection[str] = ()) -> set[str]:
    """Copy trained weights into a model as `build_model` does for `model.init_from`; return their names."""
    source = fitting_source(model, path, allow_missing)
    copy_weights(dict(model.named_parameters()), source.weights)
    return set(source.weights)


def tokenizer(last: int = 9) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(last)} | {"<|endoftext|>": last}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
