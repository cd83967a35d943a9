"""Causal attention: over packed samples by four attention backends, over padded rows by those of transformers.

`varlen_attention` takes samples concatenated end to end, as flash-attn does. On a GPU it runs FlashAttention 3 (Hopper)
or flash-attn where they are installed and can be imported, else torch's own variable-length FlashAttention; everywhere
else (and in fp32) SDPA, which pads queries, keys and values to `[samples, longest]` inside this function only. On a CPU
samples of more than a few tokens attend one after the other instead, without padding or copies.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tinygptv_ds.errors import ConfigError

# Module and function of each backend that needs a GPU, best first. flash-attn 4 (`flash_attn.cute` alone) is not among
# them, because its backward pass does not cover packed rows of head dimension 80 on all of its GPUs.
_FUNCTIONS = {
    "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn"),
}
BACKENDS = (*_FUNCTIONS, "sdpa")
# Of SDPA, in its own order; flash needs 16 bits and a GPU as new as `_OLDEST`, the next one neither.
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
_OLDEST = (8, 0)  # compute capability that FlashAttention 2 needs, flash-attn's and torch's own: Ampere
_SHORT = 64  # tokens; on a CPU shorter samples are padded, which costs less than a call for each
_HOPPER = 9  # major compute capability that FlashAttention 3 is written for


@dataclass(frozen=True)
class PackedLayout:
    """The boundaries of the samples of a packed row, made once a forward pass and shared by all layers.

    Attributes:
        cu_seqlens: int32 `[samples + 1]`, boundaries of the samples, starting with 0 and ending with the row length.
        max_seqlen: length of the longest sample, a plain int so that no layer has to ask the device.
        backend: one of `BACKENDS`.
        padded_rows: int64 `[tokens]`, the row of each token when padded to `[samples * max_seqlen]` (SDPA only).
        lengths: the length of each sample, where they attend one after the other (SDPA on a CPU only).
    """

    cu_seqlens: Tensor
    max_seqlen: int
    backend: str
    padded_rows: Tensor | None = None
    lengths: tuple[int, ...] | None = None


def available_backends(device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """Return the attention backends that can run on this device in this dtype, best first."""
    return list(_found(torch.device(device), dtype)[0])


def unusable_backends(device: torch.device | str, dtype: torch.dtype) -> dict[str, str]:
    """Return the attention backends that are installed for this device and cannot be imported, with the reasons."""
    return dict(_found(torch.device(device), dtype)[1])


@lru_cache
def _found(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Look up once, since every forward pass asks, the usable backends and the unusable ones with the reasons."""
    half = dtype in (torch.float16, torch.bfloat16)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and half else (0, 0)
    if capability < _OLDEST:
        return ("sdpa",), ()
    usable, unusable = [], []
    for name, (module, function) in _FUNCTIONS.items():
        if (name == "flash_attn_3" and capability[0] != _HOPPER) or not _is_installed(module):
            continue
        try:
            getattr(importlib.import_module(module), function)
        except Exception as error:  # an extension built for another torch raises ImportError, OSError or RuntimeError
            unusable.append((name, f"{type(error).__name__}: {error}"))
        else:
            usable.append(name)
    return (*usable, "sdpa"), tuple(unusable)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package around it
        return False


def choose_backend(wanted: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Return the attention backend for `wanted`: the best available one for "auto", else exactly the one named.

    Raises:
        ConfigError: the backend asked for cannot run here.
    """
    found = available_backends(device, dtype)
    if wanted == "auto":
        return found[0]
    if wanted in found:
        return wanted
    reason = unusable_backends(device, dtype).get(wanted)
    if reason is not None:
        raise ConfigError(
            f"model.attention: {wanted!r} is installed but cannot be imported ({reason}). Install a build for "
            f"torch {torch.__version__}, or use 'auto', which takes {found[0]!r}."
        )
    raise ConfigError(
        f"model.attention: {wanted!r} cannot run on {torch.device(device).type} in {dtype}; "
        f"here there is {', '.join(found)}. Use 'auto', or install flash-attn (requirements-gpu.txt) on a machine "
        "with a GPU of compute capability 8.0 (Ampere) or newer."
    )


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
    one_by_one = lengths.device.type == "cpu" and max_seqlen > _SHORT
    return PackedLayout(
        cu_seqlens,
        max_seqlen,
        backend,
        padded_rows=sample * max_seqlen + offset,
        lengths=tuple(lengths.tolist()) if one_by_one else None,
    )


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
    # Compiled, the padded form is one graph for any lengths.
    if not torch.compiler.is_compiling() and layout.lengths is not None:
        return _one_by_one(q, k, v, layout.lengths)
    if layout.padded_rows is not None:
        return _padded_sdpa(q, k, v, layout.padded_rows, len(cu) - 1, longest)
    if layout.backend in ("flash_attn", "flash_attn_3"):
        module, function = _FUNCTIONS[layout.backend]
        attend = getattr(importlib.import_module(module), function)
        out = attend(q, k, v, cu, cu, longest, longest, causal=True)
        return out[0] if isinstance(out, tuple) else out  # FlashAttention 3 returned the log-sum-exps, too, at first
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(  # type: ignore[return-value]  # a tuple only with return_aux
        q, k, v, cu, cu, longest, longest, window_size=(-1, 0)
    )


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend sample by sample; neighbours of equal length together."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    rows = [length * count for length, count in runs]
    outputs = []
    for (length, count), *qkv in zip(runs, q.split(rows), k.split(rows), v.split(rows), strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _padded_sdpa(q: Tensor, k: Tensor, v: Tensor, padded_rows: Tensor, samples: int, longest: int) -> Tensor:

    def pad(x: Tensor) -> Tensor:
        # Zeros after each sample's end are never attended: a causal row sees only what precedes it.
        padded = x.new_zeros(samples * longest, *x.shape[1:]).index_copy(0, padded_rows, x)
        return padded.unflatten(0, (samples, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, padded_rows)


def padded_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, implementation: str
) -> tuple[Tensor, Tensor | None]:
    """Attend in padded rows, for generation with a cache, by one of transformers' implementations.

    Args:
        module: the attention layer, which transformers asks for its `config`.
        q: `[batch, heads, queries, head_dim]`.
        k: `[batch, heads, keys, head_dim]`.
        v: as `k`.
        mask: from `padded_mask`; None: everywhere.
        implementation: as `attn_implementation` of transformers.

    Returns:
        `[batch, queries, heads, head_dim]`, and the attention weights `[batch, heads, queries, keys]` if it is "eager".
    """
    if implementation == "sdpa":
        assert mask is None or isinstance(mask, Tensor)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2), None
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _eager_attention)
    return attend(module, q, k, v, mask, dropout=0.0, scaling=q.shape[-1] ** -0.5)


def _eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, scaling: float
) -> tuple[Tensor, Tensor]:
    weights = q @ k.transpose(2, 3) * scaling
    weights = (weights if mask is None else weights + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


def padded_mask(
    config: PreTrainedConfig,
    implementation: str,
    embeds: Tensor,
    attention_mask: Tensor,
    cache: Cache | None,
    position_ids: Tensor,
) -> Tensor | BlockMask | None:
    """Return the causal mask of padded rows in the form that an implementation of attention takes.

    Args:
        config: of the language model.
        implementation: as in `padded_attention`.
        embeds: `[batch, queries, width]`.
        attention_mask: `[batch, keys]`, 1 for real positions.
        cache: earlier keys; None: there are none.
        position_ids: `[batch, queries]`.
    """
    queries = embeds.shape[1]
    if implementation == "sdpa":
        return causal_mask(attention_mask, queries, None if cache is None else cache.get_mask_sizes(queries, 0)[0])
    return create_causal_mask(config, embeds, attention_mask, cache, position_ids)


def fused_sdpa(device: torch.device, head_dim: int) -> AbstractContextManager[object]:
    """Return a context in which SDPA on a GPU runs a fused kernel or fails, for attention without a mask.

    Where no fused kernel fits, SDPA would write all scores to memory, several times slower, without a word.

    Args:
        device: where it runs.
        head_dim: dimensions of a head; fused kernels take multiples of 8.
    """
    # Fake CUDA tensors on a machine without a GPU have no kernels at all.
    if device.type != "cuda" or head_dim % 8 or not torch.cuda.is_available():
        return nullcontext()
    return sdpa_kernel(_FUSED)


def causal_mask(attention_mask: Tensor, queries: int, keys: int | None = None) -> Tensor:
    """Return the causal mask of the last `queries` positions, bool `[batch, 1, queries, keys]`.

    `attention_mask` is `[batch, positions]`, 1 for real positions; a static cache has more `keys`, not filled yet. A
    padding position attends to itself, since a softmax over nothing gives NaN.
    """
    filled = attention_mask.shape[1]
    real = F.pad(attention_mask, (0, (keys or filled) - filled)).bool()
    position = torch.arange(real.shape[1], device=attention_mask.device)
    query = position[filled - queries : filled, None]
    allowed = (position[None, :] <= query) & real[:, None, :]
    return (allowed | (position[None, :] == query))[:, None]
