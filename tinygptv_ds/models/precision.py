"""Which dtype a part of the model computes in, inside autocast and out of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matrix products run in: autocast's inside autocast, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def own_dtype(device: torch.device, dtype: torch.dtype, *, frozen: bool) -> AbstractContextManager[object]:
    """Return a context without autocast for frozen 16-bit weights, and one that changes nothing for all others.

    For a part whose residual stream is of 16 bits anyway, as the ViT's is: autocast would read and write its LayerNorms
    in fp32 and cast their outputs back, twice the memory traffic for the same numbers.

    Args:
        device: where the part computes.
        dtype: of the part's weights.
        frozen: whether none of them is trained.
    """
    own = frozen and dtype != torch.float32
    return torch.autocast(device.type, enabled=False) if own else nullcontext()


def own_autocast(device: torch.device, dtype: torch.dtype, *, frozen: bool) -> AbstractContextManager[object]:
    """Return autocast to the dtype of frozen 16-bit weights, and a context that changes nothing for all others.

    For a part whose residual stream passes through LayerNorms, as the Q-Former's does: autocast keeps it in fp32 on a
    GPU, without which features are about twice as far from fp32's. The arguments are those of `own_dtype`.
    """
    own = frozen and dtype != torch.float32
    return torch.autocast(device.type, dtype) if own else nullcontext()
