"""Causal attention over packed samples: one function, three back ends.

`varlen_attention` takes samples laid end to end, as flash-attn does. On a GPU it runs flash-attn where that is
installed, else torch's own variable-length FlashAttention; everywhere else (and in fp32) SDPA, which pads queries, keys
and values to `[samples, longest]` inside this function only.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tinygptv_ds.errors import ConfigError

BACKENDS = ("flash_attn", "torch_varlen", "sdpa")
_OLDEST = (8, 0)  # compute capability that FlashAttention 2 needs, flash-attn's and torch's own: Ampere


@dataclass(frozen=True)
class Packing:
    """Where the samples of a packed batch lie; made once a step and shared by all layers.

    Attributes:
        cu_seqlens: int32 `[samples + 1]`, boundaries of the samples, starting with 0 and ending with the row length.
        max_seqlen: length of the longest sample, a plain int so that no layer has to ask the device.
        backend: one of `BACKENDS`.
        padded_rows: int64 `[tokens]`, where each token lands in a padded `[samples * max_seqlen]` layout (SDPA only).
    """

    cu_seqlens: Tensor
    max_seqlen: int
    backend: str
    padded_rows: Tensor | None = None


def available_backends(device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """The back ends that can run on this device in this dtype, best first."""
    return list(_found(torch.device(device), dtype))


@lru_cache
def _found(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Asked in every forward pass: what is installed is looked up once."""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half or torch.cuda.get_device_capability(device) < _OLDEST:
        return ("sdpa",)
    modules = {"flash_attn": "flash_attn", "torch_varlen": "torch.nn.attention.varlen"}
    return (*(name for name, module in modules.items() if importlib.util.find_spec(module) is not None), "sdpa")


def choose_backend(wanted: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The back end for `wanted`: "auto" takes the best there is, a name takes exactly that one.

    Raises:
        ConfigError: the back end asked for cannot run here.
    """
    found = available_backends(device, dtype)
    if wanted == "auto":
        return found[0]
    if wanted not in found:
        raise ConfigError(
            f"model.attention: {wanted!r} cannot run on {torch.device(device).type} in {dtype}; "
            f"here there is {', '.join(found)}. Use 'auto', or install flash-attn (requirements-gpu.txt) on a machine "
            "with a GPU of compute capability 8.0 (Ampere) or newer."
        )
    return wanted


def make_packing(cu_seqlens: Tensor, max_seqlen: int, tokens: int, backend: str) -> Packing:
    """Build the `Packing` of a batch.

    Args:
        cu_seqlens: int32 `[samples + 1]` on the device.
        max_seqlen: length of the longest sample.
        tokens: length of the packed row, equal to the last entry of `cu_seqlens`.
        backend: one of `BACKENDS`.
    """
    if backend != "sdpa":
        return Packing(cu_seqlens, max_seqlen, backend)
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    sample = torch.arange(len(starts), device=starts.device).repeat_interleave(lengths, output_size=tokens)
    offset = torch.arange(tokens, device=starts.device) - starts[sample]
    return Packing(cu_seqlens, max_seqlen, backend, sample * max_seqlen + offset)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Causal attention inside each sample of a packed row.

    Args:
        q: `[tokens, heads, head_dim]`, like `k` and `v`; scaled by `head_dim ** -0.5` here.
        k: keys.
        v: values.
        packing: where the samples lie.

    Returns:
        `[tokens, heads, head_dim]` in the dtype of `v`.
    """
    if packing.backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        cu, longest = packing.cu_seqlens, packing.max_seqlen
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    if packing.backend == "torch_varlen":
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = packing.cu_seqlens, packing.max_seqlen
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))
    return _padded_sdpa(q, k, v, packing)


def _padded_sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    samples, longest = len(packing.cu_seqlens) - 1, packing.max_seqlen

    def pad(x: Tensor) -> Tensor:
        # Zeros after each sample's end are never attended: a causal row sees only what lies before it.
        padded = x.new_zeros(samples * longest, *x.shape[1:]).index_copy(0, packing.padded_rows, x)
        return padded.unflatten(0, (samples, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, packing.padded_rows)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of padded rows, for generation with a cache.

    Args:
        q: `[batch, heads, queries, head_dim]`.
        k: `[batch, heads, keys, head_dim]`.
        v: as `k`.
        mask: bool `[batch, 1, queries, keys]`, true where a query may look.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Bool `[batch, 1, queries, keys]` for the last `queries` positions of `attention_mask` `[batch, keys]`.

    A padding position sees itself, so that no softmax runs over nothing.
    """
    keys = attention_mask.shape[1]
    position = torch.arange(keys, device=attention_mask.device)
    query = position[-queries:, None]
    allowed = (position[None, :] <= query) & attention_mask[:, None, :].bool()
    return (allowed | (position[None, :] == query))[:, None]
