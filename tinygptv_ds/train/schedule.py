"""The learning rate as a pure function of the step. No torch."""

from __future__ import annotations

import math

from tinygptv_ds.config.schema import OptimizerSection


def learning_rate(step: int, optimizer: OptimizerSection, *, steps_per_epoch: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warm-up, then a cosine.

    As the original computes it (LAVIS `LinearWarmupCosineLRScheduler`): the warm-up counts steps within an epoch, so
    one longer than an epoch starts again, and the cosine runs over all steps, the warm-up included.
    """
    lr, low = optimizer.lr, optimizer.min_lr
    if step < optimizer.warmup_steps:
        start = optimizer.warmup_lr if optimizer.warmup_lr >= 0 else lr
        return min(lr, start + (lr - start) * (step % steps_per_epoch) / max(optimizer.warmup_steps, 1))
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * step / total_steps))
