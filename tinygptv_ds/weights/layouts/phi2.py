"""Phi folders in any of the three layouts that Phi-2 was published in, to canonical names and back.

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

import torch
from torch import Tensor

from tinygptv_ds.errors import WeightsError
from tinygptv_ds.weights.io import Stored, listing, open_weights
from tinygptv_ds.weights.source import Source, rename_all

PREFIX = "language_model."
# The norms that TinyGPT-V added to Phi; no Phi-2 file has them.
ADDED_NORMS = re.compile(
    r"language_model\.model\.layers\.\d+\.(self_attn\.[qk]_layernorm\.(weight|bias)|post_layernorm\.weight)"
)
_SPLIT = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)")
# The first remote code's names and today's, the layers' apart; in this order both ways.
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


def fuse_split(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`[heads * head_dim, ...]` each to fused rows `[heads * 3 * head_dim, ...]`."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in (q, k, v)], dim=1).flatten(0, 2)


def split_fused(fused: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `fuse_split`; also splits the rows of LoRA's B on a fused layer."""
    q, k, v = (part.flatten(0, 1).contiguous() for part in fused.unflatten(0, (heads, 3, -1)).unbind(1))
    return q, k, v


def fuse_remote(wqkv: Tensor, heads: int) -> Tensor:
    """Rows [3, heads, head_dim] of the first remote code to fused rows [heads, 3, head_dim]."""
    return wqkv.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def unfuse_remote(fused: Tensor, heads: int) -> Tensor:
    """The inverse of `fuse_remote`."""
    return fused.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def in_layer(name: str) -> str:
    """A canonical name of a block without the block: `self_attn.q_layernorm.weight`."""
    return name.split(".", 4)[-1]


def layout(names: Iterable[str], path: Path) -> str:
    """Which layout these names are of: "remote", "fused" or "split"; `path` is named in errors.

    Raises:
        WeightsError: none of the three, or several at once.
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
    """A folder's weights under canonical names, with fused query_key_value.

    Args:
        folder: holds the weights, in one file or in shards.
        heads: attention heads, from the folder's config.json.

    Raises:
        WeightsError: missing or damaged files, or no known layout.
    """
    return to_canonical(open_weights(folder), heads, folder)


def to_canonical(stored: Mapping[str, Stored], heads: int, path: Path) -> Source:
    """Tensors in any of the three layouts under canonical names; the qkv rows are re-ordered when they are read.

    Raises:
        WeightsError: no known layout, or one of q, k and v is missing.
    """
    kind = layout(stored, path)
    if kind == "split":
        stored = _fuse_all(stored, heads, path)
    elif kind == "remote":
        stored = {
            name: Stored(t.shape, t.dtype, partial(_read_remote, t, heads)) if ".mixer.Wqkv." in name else t
            for name, t in stored.items()
        }
    return rename_all(stored, _canonical_name, path)


def to_layout(weights: Mapping[str, Stored], heads: int, kind: str) -> dict[str, Stored]:
    """The inverse of `to_canonical`: Phi's tensors, LoRA merged, under the names of a layout.

    Args:
        weights: by canonical name; the rest of a TinyGPT-V is left out.
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
    """A name of the first remote code as today's (`old` 0), or the other way round (1); others stay as they are."""
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
                raise WeightsError(
                    f"{path}: {listing(missing)} missing next to {name}; a shard is missing or cut short"
                )
            parts = [stored[n] for n in names]
            rows = sum(part.shape[0] for part in parts)
            shape = (rows, *tensor.shape[1:])
            fused[f"{match[1]}.query_key_value.{match[3]}"] = Stored(
                shape, tensor.dtype, partial(_read_split, parts, heads)
            )
    return fused


def _read_split(parts: list[Stored], heads: int) -> Tensor:
    return fuse_split(*(part.read() for part in parts), heads)


def _read_third(stored: Stored, heads: int, number: int) -> Tensor:
    return split_fused(stored.read(), heads)[number]


def _read_unfused(stored: Stored, heads: int) -> Tensor:
    return unfuse_remote(stored.read(), heads)


def _read_remote(stored: Stored, heads: int) -> Tensor:
    return fuse_remote(stored.read(), heads)
