"""Samples per second of a card: its operations at a share of the peak, or the host's launches if they take longer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tinygptv_ds.estimate.gpus import Card
from tinygptv_ds.estimate.result import CardSpeed, Launches, Speed


@dataclass(frozen=True)
class StepWork:
    """The work of an optimizer step.

    Attributes:
        sample_operations: floating-point operations of one sample.
        batch_size: samples of a step on all GPUs.
        micro_batch: samples of one forward pass on one GPU.
        gpus: number of GPUs.
        mfu: share of a card's peak that is reached where the GPU is busy.
        launches: the work of the host.
        steps: optimizer steps of the run.
    """

    sample_operations: float
    batch_size: int
    micro_batch: float
    gpus: int
    mfu: float
    launches: Launches
    steps: int


def card_speed(card: Card, work: StepWork, fits: Callable[[float], bool]) -> CardSpeed:
    """Return the speed of a card.

    Args:
        card: the card.
        work: the work of a step.
        fits: whether micro-batches of a size fit in its memory.
    """
    full = max(1, math.ceil(work.launches.of(1) / _busy_seconds(card, work, 1.0)))  # in steps of one micro-batch
    own, whole = _speed(card, work, work.micro_batch, work.batch_size), _speed(card, work, full, full * work.gpus)
    step_seconds = work.batch_size / own.samples_per_second
    return CardSpeed(own, whole, fits(full), work.steps * step_seconds / 3600, step_seconds)


def _busy_seconds(card: Card, work: StepWork, samples: float) -> float:
    return samples * work.sample_operations / (card.teraflops * 1e12 * work.mfu)


def _speed(card: Card, work: StepWork, micro_batch: float, batch_size: float) -> Speed:
    of_one_gpu = batch_size / work.gpus
    busy, launching = _busy_seconds(card, work, of_one_gpu), work.launches.of(of_one_gpu / micro_batch)
    seconds = max(busy, launching)
    return Speed(micro_batch, batch_size / seconds, work.mfu * busy / seconds, launching > busy)
