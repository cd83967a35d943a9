"""The learning rate as a pure function of the step; imports no torch."""

from __future__ import annotations

import math

from tinygptv_ds.config.optimizer_section import OptimizerSection
from tinygptv_ds.config.recipe import Recipe


def learning_rate_of_step(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a run's optimizer step, counted from 0 over all of its cycles."""
    train = recipe.train
    return learning_rate(
        step % train.steps_per_cycle,
        recipe.optimizer,
        steps_per_epoch=train.steps_per_epoch,
        total_steps=train.steps_per_cycle,
    )


def begins_cycle(step: int, recipe: Recipe) -> bool:
    """Return whether a step is the first of a cycle that follows another one."""
    return step > 0 and step % recipe.train.steps_per_cycle == 0


def learning_rate(step: int, optimizer: OptimizerSection, *, steps_per_epoch: int, total_steps: int) -> float:
    """Return the learning rate of a step of one cycle.

    Args:
        step: counted from 0, up to `total_steps`.
        optimizer: names the schedule; see `OptimizerSection`.
        steps_per_epoch: used by the schedules published and step.
        total_steps: of the cycle.
    """
    if optimizer.schedule == "published":
        return _published(step, optimizer, steps_per_epoch, total_steps)
    lr, low, warmup = optimizer.lr, optimizer.min_lr, optimizer.warmup_steps
    if step < warmup:
        return _warmed(optimizer, step / warmup)
    if optimizer.schedule == "step":  # LAVIS `LinearWarmupStepLRScheduler`
        return max(low, lr * optimizer.decay_rate ** (step // steps_per_epoch))
    if optimizer.schedule == "constant":
        return lr
    if optimizer.schedule == "wsd":
        return lr + (low - lr) * max(0.0, 1 - (total_steps - step) / optimizer.decay_steps)
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))


def _published(step: int, optimizer: OptimizerSection, steps_per_epoch: int, total_steps: int) -> float:
    """Return the learning rate as the original computes it (LAVIS `LinearWarmupCosineLRScheduler`).

    The warm-up counts steps within an epoch, so one longer than an epoch starts again, and the cosine runs over all
    steps, the warm-up included.
    """
    lr, low = optimizer.lr, optimizer.min_lr
    if step < optimizer.warmup_steps:
        start = optimizer.warmup_lr if optimizer.warmup_lr >= 0 else lr
        return min(lr, start + (lr - start) * (step % steps_per_epoch) / max(optimizer.warmup_steps, 1))
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def _warmed(optimizer: OptimizerSection, share: float) -> float:
    start = optimizer.warmup_lr if optimizer.warmup_lr >= 0 else optimizer.lr
    return start + (optimizer.lr - start) * share
