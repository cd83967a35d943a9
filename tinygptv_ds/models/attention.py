"""Causal attention over packed samples: one function, three attention backends.

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
class PackedLayout:
    """The boundaries of the samples of a packed row, made once a forward pass and shared by all layers.

    Attributes:
        cu_seqlens: int32 `[samples + 1]`, boundaries of the samples, starting with 0 and ending with the row length.
        max_seqlen: length of the longest sample, a plain int so that no layer has to ask the device.
        backend: one of `BACKENDS`.
        padded_rows: int64 `[tokens]`, the row of each token when padded to `[samples * max_seqlen]` (SDPA only).
    """

    cu_seqlens: Tensor
    max_seqlen: int
    backend: str
    padded_rows: Tensor | None = None


def available_backends(device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """Return the attention backends that can run on this device in this dtype, best first."""
    return list(_found(torch.device(device), dtype))


@lru_cache
def _found(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Look up once what is installed, since every forward pass asks."""
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half or torch.cuda.get_device_capability(device) < _OLDEST:
        return ("sdpa",)
    modules = {"flash_attn": "flash_attn", "torch_varlen": "torch.nn.attention.varlen"}
    return (*(name for name, module in modules.items() if importlib.util.find_spec(module) is not None), "sdpa")


def choose_backend(wanted: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return the attention backend for `wanted`: the best available one for "auto", else exactly the one named.

    Raises:
        ConfigError: the backend asked for cannot run here.
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


def make_layout(cu_seqlens: Tensor, max_seqlen: int, tokens: int, backend: str) -> PackedLayout:
    """Return the `PackedLayout` of a batch.

    Args:
        cu_seqlens: int32 `[samples + 1]` on the device.
        max_seqlen: length of the longest sample.
        tokens: length of the packed row, equal to the last entry of `cu_seqlens`.
        backend: one of `BACKENDS`.
    """
    if backend != "sdpa":
        return PackedLayout(cu_seqlens, max_seqlen, backend)
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    sample = torch.arange(len(starts), device=starts.device).repeat_interleave(lengths, output_size=tokens)
    offset = torch.arange(tokens, device=starts.device) - starts[sample]
    return PackedLayout(cu_seqlens, max_seqlen, backend, sample * max_seqlen + offset)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Attend causally inside each sample of a packed row.

    Args:
        q: `[tokens, heads, head_dim]`, like `k` and `v`; scaled by `head_dim ** -0.5` here.
        k: keys.
        v: values.
        layout: the boundaries of the samples.

    Returns:
        `[tokens, heads, head_dim]` in the dtype of `v`.
    """
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    if layout.padded_rows is not None:
        return _padded_sdpa(q, k, v, layout.padded_rows, len(cu) - 1, longest)
    if layout.backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(  # type: ignore[return-value]  # a tuple only with return_aux
        q, k, v, cu, cu, longest, longest, window_size=(-1, 0)
    )


def _padded_sdpa(q: Tensor, k: Tensor, v: Tensor, padded_rows: Tensor, samples: int, longest: int) -> Tensor:

    def pad(x: Tensor) -> Tensor:
        # Zeros after each sample's end are never attended: a causal row sees only what lies before it.
        padded = x.new_zeros(samples * longest, *x.shape[1:]).index_copy(0, padded_rows, x)
        return padded.unflatten(0, (samples, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, padded_rows)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend in padded rows, for generation with a cache.

    Args:
        q: `[batch, heads, queries, head_dim]`.
        k: `[batch, heads, keys, head_dim]`.
        v: as `k`.
        mask: bool `[batch, 1, queries, keys]`, true where a query may attend; None: everywhere.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_mask(attention_mask: Tensor, queries: int) -> Tensor:
    """Return the causal mask of the last `queries` positions, bool `[batch, 1, queries, keys]`.

    `attention_mask` is `[batch, keys]`, 1 for real positions. A padding position attends to itself, since a softmax
    over nothing gives NaN.
    """
    keys = attention_mask.shape[1]
    position = torch.arange(keys, device=attention_mask.device)
    query = position[-queries:, None]
    allowed = (position[None, :] <= query) & attention_mask[:, None, :].bool()
    return (allowed | (position[None, :] == query))[:, None]
