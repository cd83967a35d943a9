"""A micro-batch's part of the loss of its optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor

from tinygptv_ds.models.loss import PackedOutput


def micro_batch_loss(output: PackedOutput, divisor: Tensor | None, *, count: int, world_size: int) -> Tensor:
    """Return this micro-batch's part of the step's loss; not-a-number where it is infinite.

    Args:
        output: of the packed forward pass.
        divisor: target tokens of the whole step over all ranks, a scalar on the device; None takes the mean over this
            micro-batch, as the original does.
        count: micro-batches of the step.
        world_size: ranks, over which DeepSpeed averages gradients.
    """
    loss = output.token_losses.sum()
    if divisor is None:
        here = max(len(output.token_losses), 1)
        loss = loss / here / count
    else:
        loss = loss / divisor * world_size  # DeepSpeed averages over ranks; the divisor already counts all of them
    loss = loss + output.anchor
    # An infinite loss may have finite gradients. Times NaN it has none, and ZeRO skips the step on all ranks.
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
