"""The kind of weights by their names, and the names without what wrappers put around a model.

DistributedDataParallel, FSDP, torch.compile and activation checkpointing add segments anywhere in a name; a larger
model that the weights are a part of (`visual.`, `model.`) adds a prefix: whatever precedes the known names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, listing

KINDS = {
    "phi": "Phi",
    "eva_vit": "EVA ViT",
    "blip2": "Q-Former of BLIP-2",
    "projection": "first projection, as of MiniGPT-4",
    "trained": "trained weights of TinyGPT-V",
    "model": "whole TinyGPT-V",
    "adapter": "LoRA in peft's format, for the model that it belongs to",
}
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FLATTENED = re.compile(r"(^|\.)_?flat_param(_\d+)?$")  # FSDP's shards of many tensors in one
# Names by which a kind is recognized, at any position in a name; in the order in which kinds are tried.
_SIGNS = {
    "trained": re.compile(
        r"(?:^|\.)((?:base_model\.model\.)*(?:llama_model\.|llama_proj2?\."
        r"|language_model\..*(?:q_layernorm|k_layernorm|post_layernorm|\.lora_[AB]|\.lora_magnitude_vector)\.)"
        r"|base_model\.model\..*\.lora_(?:[AB]|magnitude_vector)(?:\.|$))"
    ),
    "blip2": re.compile(r"(?:^|\.)(query_tokens$|[Qq]former\.)"),
    "eva_vit": re.compile(r"(?:^|\.)(patch_embed\.proj\.weight$|blocks\.\d+\.)"),
    "phi": re.compile(
        r"(?:^|\.)(transformer\.h\.\d+\.mixer\.Wqkv\.|model\.layers\.\d+\.self_attn\.(?:query_key_value|[qkv]_proj)\.)"
    ),
}


class Unwrapped(NamedTuple):
    """Tensors under a model's own names, and the names in the file that are outside of that model."""

    stored: dict[str, Stored]
    outside: list[str]


def without_wrappers(name: str) -> str:
    """Return a name without the segments that DistributedDataParallel, FSDP, torch.compile and the like add."""
    segments = name.split(".")
    if _WRAPPERS.isdisjoint(segments):
        return name
    return ".".join(segment for segment in segments if segment not in _WRAPPERS)


def unwrap(stored: Mapping[str, Stored], path: Path, kind: str | None = None) -> Unwrapped:
    """Return the tensors under the names that the model itself gives them.

    Args:
        stored: tensors by the file's names.
        path: the file, for errors.
        kind: "phi", "eva_vit", "blip2" or "trained", as which they are wanted; None finds it.

    Raises:
        WeightsError: two tensors get the same name, several models of the kind are there, or FSDP has flattened them.
    """
    flattened = [name for name in stored if _FLATTENED.search(name)]
    if flattened:
        raise WeightsError(
            f"{path}: {listing(flattened)}: shards of FSDP, in which many tensors are one; save the model again with "
            "StateDictType.FULL_STATE_DICT"
        )
    plain: dict[str, Stored] = {}
    for name, tensor in stored.items():
        short = without_wrappers(name)
        if short in plain:
            raise WeightsError(
                f"{path}: two tensors are {short} once wrappers' prefixes are left out; keep one of them"
            )
        plain[short] = tensor
    prefix = _prefix(plain, path, kind or _kind_by_signs(plain))
    return Unwrapped(
        {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)},
        [name for name in plain if not name.startswith(prefix)],
    )


def kind_of(names: Iterable[str], path: Path) -> str:
    """Return the key of `KINDS` that unwrapped names belong to; `path` is named in errors.

    Raises:
        WeightsError: they belong to none.
    """
    names = [without_wrappers(name) for name in names]
    found = _kind_by_signs(names)
    if found is None:
        raise WeightsError(
            f"{path}: holds {listing(names)}: neither {', nor '.join(KINDS.values())}. Is it the file you meant?"
        )
    if found != "trained":
        return found
    if all(re.fullmatch(r"llama_proj\.(weight|bias)", name) for name in names):
        return "projection"
    whole = any(name.endswith("model.embed_tokens.weight") for name in names)
    return "model" if whole and any(name.startswith("visual_encoder.") for name in names) else "trained"


def _kind_by_signs(names: Iterable[str]) -> str | None:
    names = list(names)
    return next((kind for kind, sign in _SIGNS.items() if any(map(sign.search, names))), None)


def _prefix(names: Iterable[str], path: Path, kind: str | None) -> str:
    """Return what precedes the names of a model of this kind, with its last dot; "" where nothing does."""
    if kind is None:
        return ""
    found = {name[: match.start(1)] for name in names if (match := _SIGNS[kind].search(name))}
    if not found or "" in found:
        return ""
    if len(found) > 1:
        raise WeightsError(
            f"{path}: {len(found)} models of this kind ({KINDS[kind]}), under {listing(found)}; save the one that is "
            "meant as a file of its own"
        )
    return found.pop()
