"""Phi's config.json in today's spelling, in that of early 2024 or in the first remote code's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PhiConfig

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import read_json
from tinygptv_ds.weights.layouts.phi2 import PREFIX

_OLD_FIELDS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}


def phi_config(folder: Path) -> PhiConfig:
    """The model's sizes from config.json in today's spelling, in that of early 2024 or in the first remote code's.

    Raises:
        WeightsError: the file is missing or incomplete, or asks for something the model does not do.
    """
    path = folder / "config.json"
    return parse_config(read_json(path), path)


def parse_config(raw: dict, path: Path) -> PhiConfig:
    """As `phi_config`, for what the file at `path` holds."""

    def value(name: str, default: object = None) -> object:
        found = raw.get(name)
        found = raw.get(_OLD_FIELDS.get(name, name)) if found is None else found
        return default if found is None else found

    sizes = {name: value(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    absent = [name for name, size in sizes.items() if not isinstance(size, int)]
    if absent:
        raise WeightsError(f"{path}: {', '.join(absent)} missing; this is no Phi configuration, fetch the folder again")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise WeightsError(
            f"{path}: a width of {sizes['hidden_size']} does not divide into {sizes['num_attention_heads']} heads; "
            "fetch the folder again"
        )
    _refuse_unknown(path, raw, value("hidden_act", "gelu_new"), sizes["num_attention_heads"])
    return PhiConfig(
        **sizes,
        intermediate_size=value("intermediate_size", 4 * sizes["hidden_size"]),
        max_position_embeddings=value("max_position_embeddings", 2048),
        layer_norm_eps=value("layer_norm_eps", 1e-5),
        resid_pdrop=value("resid_pdrop", 0.0),
        hidden_act="gelu_new",
        rope_parameters=_rope(path, raw, sizes["hidden_size"] // sizes["num_attention_heads"]),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
    )


def check_config(config: PhiConfig, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """See that a configuration is that of the weights; its heads order the rows of theirs.

    Args:
        config: from `phi_config`.
        shapes: of the weights, by canonical name, complete.
        path: of config.json, for errors.

    Raises:
        WeightsError: it is another Phi's.
    """
    vocabulary, width = shapes[PREFIX + "model.embed_tokens.weight"]
    layers = {name.split(".")[3] for name in shapes if name.startswith(PREFIX + "model.layers.")}
    inner = shapes[PREFIX + "model.layers.0.mlp.fc1.weight"][0]
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": len(layers)}
    for name, there in {**sizes, "intermediate_size": inner}.items():
        if getattr(config, name) != there:
            raise WeightsError(
                f"{path}: {name} is {getattr(config, name)}, but the weights next to it have {there}; it is another "
                "Phi's, fetch the whole folder again"
            )


def save_config(config: PhiConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write the config.json that goes with Phi's weights in `dtype`."""
    saved = PhiConfig(**config.to_dict())
    saved.architectures = ["PhiForCausalLM"]
    saved.dtype = dtype
    saved.save_pretrained(folder)


def _rope(path: Path, raw: dict, head_dim: int) -> dict:
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        raise WeightsError(f"{path}: rotary embedding of type {kind!r}; TinyGPT-V's Phi has the plain one")
    partial_factor = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial_factor is None and raw.get("rotary_dim") is not None:
        partial_factor = raw["rotary_dim"] / head_dim
    if partial_factor is None:
        raise WeightsError(
            f"{path}: no partial_rotary_factor (nor rotary_dim), so it is unknown how much of a head is rotated; "
            "Phi-2's is 0.4. Fetch the config.json of the weights again"
        )
    theta = given.get("rope_theta", raw.get("rope_theta", 10000.0))
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial_factor}


def _refuse_unknown(path: Path, raw: dict, activation: object, heads: object) -> None:
    """Settings that would change what Phi computes and that this model does not have."""
    kv_heads = raw.get("num_key_value_heads", raw.get("n_head_kv"))
    wrong = {
        f"hidden_act {activation!r} (only gelu_new)": activation not in ("gelu_new", "gelu_pytorch_tanh"),
        f"num_key_value_heads {kv_heads} (only as many as heads)": kv_heads not in (None, heads),
        "tie_word_embeddings (Phi's head is its own)": bool(raw.get("tie_word_embeddings")),
        "dropout on embeddings or attention (only resid_pdrop)": any(
            raw.get(name) for name in ("embd_pdrop", "attention_dropout", "attn_pdrop")
        ),
    }
    asked = [what for what, is_wrong in wrong.items() if is_wrong]
    if asked:
        raise WeightsError(f"{path}: not what TinyGPT-V's Phi computes: {'; '.join(asked)}")
