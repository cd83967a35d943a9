"""The training loop of both stand-ins."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOG_EVERY = 100  # steps


@dataclass(frozen=True)
class Training:
    """Length, batch (scenes or texts) and peak learning rate of a part's training.

    `first` is the share of the steps spent on the easier lessons alone.
    """

    steps: int
    batch: int
    lr: float
    first: float


def optimize(part: str, parameters: list[nn.Parameter], losses: Iterable[Tensor], training: Training) -> None:
    """Train with AdamW, a tenth of warm-up and a cosine to zero; each step takes one of `losses`."""
    optimizer = torch.optim.AdamW(parameters, training.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, training.steps // 10)
    began = time.monotonic()
    for step, loss in zip(range(training.steps), losses, strict=False):
        factor = min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / training.steps))
        for group in optimizer.param_groups:
            group["lr"] = training.lr * factor
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == training.steps:
            seconds = time.monotonic() - began
            print(f"{part}: step {step + 1}/{training.steps}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
