"""Phi folders: weights in the three layouts that Phi-2 was published in, and config.json in its three spellings.

| layout | attention | seen in |
|---|---|---|
| remote code | `transformer.h.N.mixer.Wqkv`, rows [3, heads, head_dim] | microsoft/phi-2, first release |
| fused | `model.layers.N.self_attn.query_key_value`, rows [heads, 3, head_dim] | what TinyGPT-V trained on; canonical |
| split | `model.layers.N.self_attn.{q,k,v}_proj` | microsoft/phi-2 now, transformers from 4.37 on |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PhiConfig

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.folders import open_weights
from tinygptv_ds.weights.io import Stored, listing, read_json
from tinygptv_ds.weights.layouts.exported import part_of_exported, text_config_of
from tinygptv_ds.weights.opening import model_weights
from tinygptv_ds.weights.peft_adapter import is_adapter
from tinygptv_ds.weights.source import Source, rename_all

PREFIX = "language_model."
# The norms that TinyGPT-V added to Phi; no Phi-2 file has them.
ADDED_NORMS = re.compile(
    r"language_model\.model\.layers\.\d+\.(self_attn\.[qk]_layernorm\.(weight|bias)|post_layernorm\.weight)"
)
_SPLIT = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)")
# Pairs of the first remote code's name and today's; those inside a layer are separate.
_REMOTE_NAMES = (
    ("transformer.embd.wte.", "model.embed_tokens."),
    ("lm_head.ln.", "model.final_layernorm."),
    ("lm_head.linear.", "lm_head."),
)
_REMOTE_IN_LAYER = (
    ("ln.", "input_layernorm."),
    ("mixer.Wqkv.", "self_attn.query_key_value."),
    ("mixer.out_proj.", "self_attn.dense."),
)


_OLD_FIELDS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}


def fuse_split(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Join q, k and v, `[heads * head_dim, ...]` each, to fused rows `[heads * 3 * head_dim, ...]`."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in (q, k, v)], dim=1).flatten(0, 2)


def split_fused(fused: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Invert `fuse_split`; also splits the rows of LoRA's B on a fused layer."""
    q, k, v = (part.flatten(0, 1).contiguous() for part in fused.unflatten(0, (heads, 3, -1)).unbind(1))
    return q, k, v


def fuse_remote(wqkv: Tensor, heads: int) -> Tensor:
    """Reorder rows [3, heads, head_dim] of the first remote code to fused rows [heads, 3, head_dim]."""
    return wqkv.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def unfuse_remote(fused: Tensor, heads: int) -> Tensor:
    """Invert `fuse_remote`."""
    return fused.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def in_layer(name: str) -> str:
    """Return a canonical name without its block, e.g. `self_attn.q_layernorm.weight`."""
    return name.split(".", 4)[-1]


def layout(names: Iterable[str], path: Path) -> str:
    """Return the layout of these names: "remote", "fused" or "split"; `path` is named in errors.

    Raises:
        WeightsError: they have none of the three, or several at once.
    """
    names = list(names)
    signs = {"remote": ".mixer.Wqkv.", "fused": ".self_attn.query_key_value.", "split": ".self_attn.q_proj."}
    found = [kind for kind, sign in signs.items() if any(sign in name for name in names)]
    if len(found) != 1:
        has = f"attention weights of several layouts ({', '.join(found)})" if found else "no attention weights of Phi"
        raise WeightsError(
            f"{path}: {has} among {listing(names) or 'no tensors at all'}; "
            f"a Phi checkpoint has one of {', '.join(signs.values())}"
        )
    return found[0]


def phi_source(folder: Path, heads: int) -> Source:
    """Return a folder's weights under canonical names, with fused query_key_value.

    Args:
        folder: the folder of the weights, which are in one file or in shards, or an exported model.
        heads: attention heads, from the folder's config.json.

    Raises:
        WeightsError: files are missing or damaged, or of no known layout.
    """
    unwrapped = model_weights(part_of_exported(open_weights(folder), PREFIX), folder, "phi")
    return to_canonical(*unwrapped, heads, folder)


def to_canonical(stored: Mapping[str, Stored], outside: Sequence[str], heads: int, path: Path) -> Source:
    """Return tensors of any layout under canonical names; rows of qkv are reordered when they are read.

    Raises:
        WeightsError: the layout is not known, or one of q, k and v is missing.
    """
    kind = layout(stored, path)
    if kind == "split":
        stored = _fuse_all(stored, heads, path)
    elif kind == "remote":
        stored = {
            name: Stored(t.shape, t.dtype, partial(_read_remote, t, heads)) if ".mixer.Wqkv." in name else t
            for name, t in stored.items()
        }
    return rename_all(stored, outside, _canonical_name, path)


def to_layout(weights: Mapping[str, Stored], heads: int, kind: str) -> dict[str, Stored]:
    """Invert `to_canonical`: return Phi's tensors under the names of a layout.

    Args:
        weights: by canonical name, without LoRA; the rest of a TinyGPT-V is left out.
        heads: attention heads.
        kind: "fused", "split" or "remote".
    """
    found: dict[str, Stored] = {}
    for name, stored in weights.items():
        if not name.startswith(PREFIX):
            continue
        plain = name.removeprefix(PREFIX)
        before, fused, ending = plain.partition(".query_key_value.")
        if fused and kind == "split":
            shape = (stored.shape[0] // 3, *stored.shape[1:])
            for number, letter in enumerate("qkv"):
                read = partial(_read_third, stored, heads, number)
                found[f"{before}.{letter}_proj.{ending}"] = Stored(shape, stored.dtype, read)
        elif kind == "remote":
            read = partial(_read_unfused, stored, heads)
            found[_remote_name(plain)] = Stored(stored.shape, stored.dtype, read) if fused else stored
        else:
            found[plain] = stored
    return found


def _canonical_name(name: str) -> str | None:
    if "rotary_emb." in name:  # cosine tables that some versions saved
        return None
    return PREFIX + _renamed(name, "transformer.h.", "model.layers.", 0)


def _remote_name(name: str) -> str:
    return _renamed(name, "model.layers.", "transformer.h.", 1)


def _renamed(name: str, layers: str, to_layers: str, old: int) -> str:
    """Return the other name of a pair: today's for the first remote code's (`old` 0), or the reverse (`old` 1)."""
    if name.startswith(layers):
        number, _, rest = name.removeprefix(layers).partition(".")
        return f"{to_layers}{number}.{_swapped(rest, _REMOTE_IN_LAYER, old)}"
    return _swapped(name, _REMOTE_NAMES, old)


def _swapped(name: str, pairs: Sequence[tuple[str, str]], old: int) -> str:
    for pair in pairs:
        if name.startswith(pair[old]):
            return pair[1 - old] + name.removeprefix(pair[old])
    return name


def _fuse_all(stored: Mapping[str, Stored], heads: int, path: Path) -> dict[str, Stored]:
    fused: dict[str, Stored] = {}
    for name, tensor in stored.items():
        match = _SPLIT.fullmatch(name)
        if match is None:
            fused[name] = tensor
        elif match[2] == "q":
            names = [f"{match[1]}.{letter}_proj.{match[3]}" for letter in "qkv"]
            missing = [n for n in names if n not in stored]
            if missing:
                raise WeightsError(f"{path}: {listing(missing)} missing next to {name}; name the folder of all shards")
            parts = [stored[n] for n in names]
            rows = sum(part.shape[0] for part in parts)
            shape = (rows, *tensor.shape[1:])
            fused[f"{match[1]}.query_key_value.{match[3]}"] = Stored(
                shape, tensor.dtype, partial(_read_split, parts, heads)
            )
    return fused


def _read_split(parts: list[Stored], heads: int) -> Tensor:
    q, k, v = (part.read() for part in parts)
    return fuse_split(q, k, v, heads)


def _read_third(stored: Stored, heads: int, number: int) -> Tensor:
    return split_fused(stored.read(), heads)[number]


def _read_unfused(stored: Stored, heads: int) -> Tensor:
    return unfuse_remote(stored.read(), heads)


def _read_remote(stored: Stored, heads: int) -> Tensor:
    return fuse_remote(stored.read(), heads)


def phi_config(folder: Path) -> PhiConfig:
    """Read config.json in today's spelling, in that of early 2024, or in the first remote code's.

    Raises:
        WeightsError: the file is missing or incomplete, or sets something that this model does not support.
    """
    path = folder / "config.json"
    if is_adapter(folder) and not path.is_file():
        raise WeightsError(
            f"{folder}: an adapter of peft, not whole weights; merge it into the Phi that it belongs to (peft's "
            "merge_and_unload, then save_pretrained) and name the result"
        )
    return parse_config(dict(text_config_of(read_json(path))), path)


def parse_config(raw: dict[str, Any], path: Path) -> PhiConfig:
    """Parse the content of a config.json; `path` is named in the errors, which are those of `phi_config`."""

    def value(name: str, default: Any = None) -> Any:
        found = raw.get(name)
        found = raw.get(_OLD_FIELDS.get(name, name)) if found is None else found
        return default if found is None else found

    sizes = {name: value(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    absent = [name for name, size in sizes.items() if not isinstance(size, int)]
    if absent:
        raise WeightsError(
            f"{path}: {', '.join(absent)} missing; no Phi configuration{_model_type(raw)}: name a folder of Phi-2"
        )
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise WeightsError(
            f"{path}: a width of {sizes['hidden_size']} does not divide into {sizes['num_attention_heads']} heads; "
            "take the config.json of the weights"
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
    """Check that a configuration belongs to the weights, whose rows are ordered by its number of heads.

    Args:
        config: from `phi_config`.
        shapes: of all the weights, by canonical name.
        path: of config.json, for errors.

    Raises:
        WeightsError: it belongs to another Phi.
    """
    vocabulary, width = shapes[PREFIX + "model.embed_tokens.weight"]
    layers = {name.split(".")[3] for name in shapes if name.startswith(PREFIX + "model.layers.")}
    inner = shapes[PREFIX + "model.layers.0.mlp.fc1.weight"][0]
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": len(layers)}
    for name, there in {**sizes, "intermediate_size": inner}.items():
        if getattr(config, name) != there:
            raise WeightsError(
                f"{path}: {name} is {getattr(config, name)}, but the weights next to it have {there}; it belongs "
                "to another Phi: take the config.json of the weights"
            )


def save_config(config: PhiConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write the config.json of Phi's weights in `dtype`."""
    saved = PhiConfig(**config.to_dict())
    saved.architectures = ["PhiForCausalLM"]
    saved.dtype = dtype
    saved.save_pretrained(folder)


def _model_type(raw: dict[str, Any]) -> str:
    return f" but of {raw['model_type']!r}" if isinstance(raw.get("model_type"), str) else ""


def _rope(path: Path, raw: dict[str, Any], head_dim: int) -> dict[str, Any]:
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        raise WeightsError(f"{path}: rotary embedding of type {kind!r}; TinyGPT-V's Phi has the default type")
    partial_factor = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial_factor is None and raw.get("rotary_dim") is not None:
        partial_factor = raw["rotary_dim"] / head_dim
    if partial_factor is None:
        raise WeightsError(
            f"{path}: no partial_rotary_factor (nor rotary_dim), so the rotated share of a head is unknown; "
            "Phi-2's is 0.4. Take the config.json of the weights"
        )
    theta = given.get("rope_theta", raw.get("rope_theta", 10000.0))
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial_factor}


def _refuse_unknown(path: Path, raw: dict[str, Any], activation: object, heads: object) -> None:
    """Refuse settings that would change what Phi computes and that this model does not support."""
    kv_heads = raw.get("num_key_value_heads", raw.get("n_head_kv"))
    wrong = {
        f"hidden_act {activation!r} (only gelu_new)": activation not in ("gelu_new", "gelu_pytorch_tanh"),
        f"num_key_value_heads {kv_heads} (only as many as heads)": kv_heads not in (None, heads),
        "tie_word_embeddings (Phi's head has weights of its own)": bool(raw.get("tie_word_embeddings")),
        "dropout on embeddings or attention (only resid_pdrop)": any(
            raw.get(name) for name in ("embd_pdrop", "attention_dropout", "attn_pdrop")
        ),
    }
    unsupported = [what for what, is_wrong in wrong.items() if is_wrong]
    if unsupported:
        raise WeightsError(f"{path}: TinyGPT-V's Phi does not support {'; '.join(unsupported)}")
