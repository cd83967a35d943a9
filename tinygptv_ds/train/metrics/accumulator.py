"""Losses and counts between two log lines: nothing here waits for the device, and ranks meet once per line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from tinygptv_ds.data.loader.batch import Batch, MicroBatch
from tinygptv_ds.data.shards.records import REASONS
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.models.flops import BatchCounts
from tinygptv_ds.train.engine import Engine


@dataclass(frozen=True)
class Computed:
    """A micro-batch of this rank that has been computed, with what a warning about it may need.

    Attributes:
        step: the optimizer step that it is part of, from 0.
        sample_ids: its samples.
        sample_of_target: int64 `[K]` on the CPU, number of the sample that each target belongs to.
        token_losses: fp32 `[K]` on the device.
    """

    step: int
    sample_ids: tuple[SampleRef, ...]
    sample_of_target: Tensor
    token_losses: Tensor

    def sample_losses(self) -> Iterator[tuple[SampleRef, float, int]]:
        """Yield (sample, sum of its token losses, number of its targets). Waits for the device."""
        sums = torch.zeros(len(self.sample_ids), dtype=torch.float64)
        sums.index_add_(0, self.sample_of_target, self.token_losses.double().cpu())
        counts = torch.bincount(self.sample_of_target, minlength=len(self.sample_ids))
        return zip(self.sample_ids, sums.tolist(), counts.tolist(), strict=True)


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one rank since the last log line: waiting for data, and in its forward passes."""

    data_wait: float
    forward: float

    @property
    def own(self) -> float:
        """The time that the other ranks may have to wait for."""
        return self.data_wait + self.forward


@dataclass(frozen=True)
class Totals:
    """What all ranks did since the last log line.

    Attributes:
        loss: mean over target tokens.
        loss_by_dataset: the same of each dataset that had any.
        steps: (step, its mean loss, its target tokens) in order; NaN for the loss of a step without targets.
        samples: used, by dataset.
        skipped: samples that dropped out, by reason.
        work: what the costs are counted from.
        ranks: times of each rank.
        recent: the micro-batches of this rank.
        with_images: of `samples`, those with an image.
    """

    loss: float
    loss_by_dataset: dict[str, float]
    steps: list[tuple[int, float, float]]
    samples: dict[str, int]
    skipped: dict[str, int]
    work: BatchCounts
    ranks: list[RankTimes]
    recent: list[Computed]
    with_images: dict[str, int] = field(default_factory=dict)


class Accumulator:
    """Losses and counts since the last log line.

    Losses stay on the device; what is known on the host is counted there. `read` combines both in one sum over the
    ranks.
    """

    def __init__(self, engine: Engine, datasets: list[str]) -> None:
        self._engine = engine
        self._datasets = datasets
        self._losses = torch.zeros(2 * len(datasets), dtype=torch.float64, device=engine.device)
        self._reset()

    def _reset(self) -> None:
        self._losses.zero_()
        self._samples = dict.fromkeys(self._datasets, 0)
        self._with_images = dict.fromkeys(self._datasets, 0)
        self._skipped = dict.fromkeys(REASONS, 0)
        self._work = [0.0, 0.0, 0.0, 0.0]
        self.recent: list[Computed] = []

    def add(self, step: int, loaded: MicroBatch, batch: Batch, token_losses: Tensor) -> None:
        """Count one micro-batch.

        Args:
            step: the optimizer step, from 0.
            loaded: as it came from the loader, on the CPU.
            batch: the same on the device.
            token_losses: fp32 `[K]` on the device.
        """
        token_losses = token_losses.detach()
        losses = token_losses.double()
        self._losses.index_add_(0, batch.target_dataset, losses)
        self._losses.index_add_(0, batch.target_dataset + len(self._datasets), torch.ones_like(losses))
        for ref, has_image in zip(loaded.batch.sample_ids, loaded.batch.has_image().tolist(), strict=True):
            self._samples[ref.dataset] += 1
            self._with_images[ref.dataset] += has_image
        for skipped in loaded.skipped:
            self._skipped[skipped.reason] += 1
        self._work = [a + b for a, b in zip(self._work, _work(loaded.batch), strict=True)]
        self.recent.append(Computed(step, loaded.batch.sample_ids, _sample_of_target(loaded.batch), token_losses))

    def read(self, times: RankTimes) -> Totals:
        """Return the totals over all ranks and start again from zero. Call on all ranks.

        Args:
            times: of this rank.
        """
        ranks, rank = self._engine.ranks.world_size, self._engine.ranks.rank
        mine = [0.0] * (2 * ranks)
        mine[2 * rank : 2 * rank + 2] = [times.data_wait, times.forward]
        by_dataset = [*self._samples.values(), *self._with_images.values()]
        host = [*by_dataset, *self._skipped.values(), *self._work, *mine]
        steps, by_step = self._by_step()
        counted = torch.tensor(host, dtype=torch.float64, device=self._losses.device)
        values = iter(self._engine.all_reduce(torch.cat([self._losses, by_step, counted])).tolist())
        sums, tokens = _take(values, self._datasets), _take(values, self._datasets)
        step_sums, step_tokens = _take(values, steps), _take(values, steps)
        samples, with_images = _take(values, self._datasets), _take(values, self._datasets)
        skipped = _take(values, REASONS)
        totals = Totals(
            loss=sum(sums.values()) / max(sum(tokens.values()), 1),
            loss_by_dataset={name: sums[name] / tokens[name] for name in self._datasets if tokens[name]},
            steps=[(s, step_sums[s] / step_tokens[s] if step_tokens[s] else math.nan, step_tokens[s]) for s in steps],
            samples={name: int(count) for name, count in samples.items()},
            skipped={reason: int(count) for reason, count in skipped.items() if count},
            work=BatchCounts(*(next(values) for _ in range(4))),
            ranks=[RankTimes(next(values), next(values)) for _ in range(ranks)],
            recent=self.recent,
            with_images={name: int(count) for name, count in with_images.items()},
        )
        self._reset()
        return totals

    def _by_step(self) -> tuple[list[int], Tensor]:
        """Return the steps since the last line and, on the device, float64 `[2 * steps]`: losses, then targets."""
        parts = {step: list(group) for step, group in groupby(self.recent, key=lambda micro: micro.step)}
        zero = self._losses.new_zeros(())
        losses = [sum((m.token_losses.sum(dtype=torch.float64) for m in each), start=zero) for each in parts.values()]
        tokens = [float(sum(len(micro.token_losses) for micro in each)) for each in parts.values()]
        if not parts:
            return [], self._losses[:0]
        return list(parts), torch.cat([torch.stack(losses), self._losses.new_tensor(tokens)])


def _take(values: Iterator[float], keys: Iterable) -> dict:
    return {key: next(values) for key in keys}


def _work(batch: Batch) -> tuple[float, float, float, float]:
    """Return the fields of `BatchCounts` for a batch on the CPU."""
    images = batch.pixel_values if batch.image_features is None else batch.image_features
    squares = float(np.square(np.diff(batch.cu_seqlens.numpy()), dtype=np.float64).sum())
    return len(batch.input_ids), squares, len(batch.targets), len(images)


def _sample_of_target(batch: Batch) -> Tensor:
    return torch.bucketize(batch.target_rows, batch.cu_seqlens[1:].long(), right=True)
