"""The language-model loss, over target tokens only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each target token, in fp32.

    Args:
        logits: `[K, vocabulary]`, any float dtype.
        targets: int64 `[K]`.

    Returns:
        fp32 `[K]`, not reduced: the caller divides by the target tokens of the whole optimizer step.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")
