"""No silent harm: a step that is not finite ends the run before it moves a weight, odd losses name their samples.

A loss that is not finite is made a gradient that is not (`Engine.micro_step`), and before ZeRO moves anything it finds
out about gradients on all ranks together, in any case. So the check here costs nothing: it asks the engine whether the
step was taken.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path

import torch

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import OpenStream, Planner
from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.files import whole_file
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.metrics.accumulator import Done, Totals

_WINDOW, _LEAST = 128, 32  # steps that a loss is held against, and how many of them there must be
_SPIKE = 6.0  # standard deviations of the loss's logarithm
_NARROWEST = 0.02  # of its standard deviation: less than 12 % above the median is no spike however calm the run
_NAMED = 5  # samples in a message


class Guard:
    """Watches every step of a run.

    Args:
        engine: tells whether a step was taken.
        stream: names the samples.
    """

    def __init__(self, engine: Engine, stream: OpenStream) -> None:
        self._engine = engine
        self._stream = stream
        self._planner = Planner(stream, engine.job.ranks.world_size)
        self._reader = ShardReader(cache=stream.cache)
        self._spikes = Spikes()
        self._left_out = 0

    def look(self, step: int, loaded: list[MicroBatch]) -> None:
        """Report micro-batches of this rank that teach nothing, but for those that no sample was planned for."""
        for number, item in enumerate(loaded):
            if not len(item.batch.targets):
                planned = self._planner.plan(step).micro_batch(number, self._engine.job.ranks.rank)
                named = ", ".join(map(self._name, planned))
                if named:
                    LOGGER.warning("step %d: micro-batch %d has no target token: %s", step + 1, number, named)

    def stop_if_left_out(self, step: int, recent: list[Done]) -> None:
        """End the run where the optimizer did not take the step that was just computed. To be called on all ranks.

        In fp16 the loss scale is halved after such a step; only `train.max_overflows` in a row end the run.

        Args:
            step: counted from 0.
            recent: this rank's micro-batches, those of the step among them.

        Raises:
            TinyGPTVError: names the samples, and the file in the run directory with all of them.
        """
        if self._engine.step_taken:
            self._left_out = 0
            return
        self._left_out += 1
        limit = self._engine.job.recipe.train.max_overflows if self._engine.job.precision == "fp16" else 1
        if self._left_out >= limit:
            losses = self._sample_losses(step, recent)
            file = self._engine.job.run_dir / f"bad_step-{step + 1}.json"
            if self._engine.job.ranks.is_main:
                self._write(file, step, losses)
            raise TinyGPTVError(self._explanation(step, losses, file))

    def judge(self, totals: Totals) -> int:
        """Report spikes of the loss and steps without targets since the last log line. To be called on all ranks.

        Returns:
            How many spikes there were.
        """
        found = 0
        for step, loss, targets in totals.steps:
            if not targets:
                LOGGER.warning("step %d had no target token on any rank: nothing but decay moved a weight", step + 1)
            elif (score := self._spikes.score(loss)) > _SPIKE:
                found += 1
                worst = _highest(self._sample_losses(step, totals.recent))
                LOGGER.warning(
                    "the loss of step %d spikes: %.4f, %.1f deviations above the steps before it (median %.4f). "
                    "Its samples with the highest losses: %s",
                    step + 1,
                    loss,
                    score,
                    self._spikes.median,
                    ", ".join(f"{self._name(ref)} ({value:.2f})" for ref, value in worst),
                )
            self._spikes.add(loss)
        return found

    def _sample_losses(self, step: int, recent: list[Done]) -> dict[SampleRef, float | None]:
        """Mean token loss of each sample of a step, from all ranks; None for one that dropped out."""
        samples = self._stream.order.step(step)
        first = step * self._stream.batch_size
        table = torch.zeros(len(samples), 2, dtype=torch.float64)
        for done in recent:
            if done.step == step:
                for ref, total, count in done.sample_losses():
                    table[ref.position - first] = torch.tensor([total, count])
        rows = self._engine.all_reduce(table.to(self._engine.device)).tolist()
        return {ref: total / count if count else None for ref, (total, count) in zip(samples, rows, strict=True)}

    def _write(self, file: Path, step: int, losses: dict[SampleRef, float | None]) -> None:
        plan, ranks = self._planner.plan(step), range(self._engine.job.ranks.world_size)
        described = {
            "step": step + 1,
            "grad_norm": str(self._engine.grad_norm()),
            "loss_scale": self._engine.loss_scale(),
            "left_out_in_a_row": self._left_out,
            "ranks": [
                {"rank": rank, "samples": [self._described(ref, losses[ref]) for ref in plan.rank_share(rank)]}
                for rank in ranks
            ],
        }
        try:
            with whole_file(file) as partial:
                partial.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:  # the stop itself matters more
            LOGGER.warning("%s could not be written: %s", file, error)

    def _described(self, ref: SampleRef, loss: float | None) -> dict:
        tar = self._stream.shards[ref.dataset][ref.shard]
        key = self._reader.key(tar, ref.index)
        place = {"dataset": ref.dataset, "shard": str(tar), "key": key, "index": ref.index, "position": ref.position}
        return place | {"loss": loss if loss is None or math.isfinite(loss) else str(loss)}

    def _name(self, ref: SampleRef) -> str:
        tar = self._stream.shards[ref.dataset][ref.shard]
        return f"{ref.dataset}, {tar}: sample {self._reader.key(tar, ref.index)}"

    def _explanation(self, step: int, losses: dict[SampleRef, float | None], file: Path) -> str:
        bad = [ref for ref, loss in losses.items() if loss is not None and not math.isfinite(loss)]
        rank_of = {ref: r for r in range(self._planner.world_size) for ref in self._planner.plan(step).rank_share(r)}
        if bad:
            listed = "".join(f"\n  - {self._name(ref)} (rank {rank_of[ref]})" for ref in bad[:_NAMED])
            more = f"\n  and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            what = f"the loss is not finite at step {step + 1}, for these samples:{listed}{more}\n"
        else:
            what = f"a gradient is not finite at step {step + 1}, though the loss of every sample is. "
        if self._left_out > 1:
            what = f"{self._left_out} steps in a row overflowed in fp16 (train.max_overflows). At the last, {what}"
        return (
            f"{what}Weights and optimizer are as they were before it; all samples of the step are in {file}. Look at "
            "them, lower optimizer.lr or lengthen optimizer.warmup_steps, and go on from the last checkpoint"
        )


class Spikes:
    """How far a loss lies above those before it, in standard deviations, as their median and 95th percentile tell them.

    Logarithms are compared, so that one limit serves large batches, whose losses hardly vary, and small ones, whose
    losses vary by their own size. Neither of the two values is moved by a few outliers, so a spike does not hide the
    next one; and what one step in twenty reaches, as where each step holds one dataset, is none.
    """

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=_WINDOW)

    @property
    def median(self) -> float:
        """Of the losses before."""
        return math.exp(statistics.median(self._logs))

    def score(self, loss: float) -> float:
        """Of a loss that has not been added yet; 0 as long as there are too few to compare with."""
        if len(self._logs) < _LEAST or not loss > 0:
            return 0.0
        middle = statistics.median(self._logs)
        high = statistics.quantiles(self._logs, n=20, method="inclusive")[-1]
        deviation = (high - middle) / 1.645
        return (math.log(loss) - middle) / max(deviation, _NARROWEST)

    def add(self, loss: float) -> None:
        """Remember a step's loss; one that is not a positive number is left out."""
        if 0 < loss < math.inf:
            self._logs.append(math.log(loss))


def _highest(losses: dict[SampleRef, float | None]) -> list[tuple[SampleRef, float]]:
    known = [(ref, loss) for ref, loss in losses.items() if loss is not None and not math.isnan(loss)]
    return sorted(known, key=lambda pair: pair[1], reverse=True)[:_NAMED]
