"""Protection from silent harm: a step that is not finite ends the run, and unusual losses name their samples.

A loss that is not finite gets a gradient that is not finite (`micro_batch_loss`), and ZeRO checks the gradients of all
ranks in any case before it moves a weight. So the check here costs nothing: it asks the engine whether the step was
taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.shards.reader import ShardReader
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import OpenStream, Planner
from tinygptv_ds.errors import TinyGPTVError
from tinygptv_ds.files import whole_file
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.callback import Callback, LogRecord
from tinygptv_ds.train.metrics.accumulator import Accumulator, Computed
from tinygptv_ds.train.metrics.loss_spikes import SPIKE, LossSpikes
from tinygptv_ds.train.run import Run

_NAMED = 5  # samples in a message


class Guard(Callback):
    """Ends the run at a step that is not finite; warns of loss spikes and of batches without target tokens.

    Settings: `train.max_overflows`. Metrics: `train/spike`, the loss spikes since the last log line.

    Args:
        run: the run on this rank.
        stream: names the samples.
        accumulator: knows the latest token losses.
    """

    def __init__(self, run: Run, stream: OpenStream, accumulator: Accumulator) -> None:
        self._run = run
        self._engine = run.engine
        self._stream = stream
        self._accumulator = accumulator
        self._planner = Planner(stream, run.ranks.world_size)
        self._reader = ShardReader(cache=stream.cache)
        self._spikes = LossSpikes()
        self._skipped_in_a_row = 0

    def on_batch(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Warn of this rank's micro-batches without target tokens, unless no sample was planned for them."""
        for number, micro_batch in enumerate(micro_batches):
            if not len(micro_batch.batch.targets):
                planned = self._planner.plan(step).micro_batch(number, self._run.ranks.rank)
                named = ", ".join(map(self._name, planned))
                if named:
                    LOGGER.warning("step %d: micro-batch %d has no target token: %s", step + 1, number, named)

    def on_step(self, step: int) -> None:
        """End the run where the optimizer skipped the step that was just computed.

        In fp16 the loss scale is halved after such a step; only `train.max_overflows` in a row end the run.

        Raises:
            TinyGPTVError: names the samples, and the file in the run directory with all of them.
        """
        if self._engine.step_taken:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        limit = self._run.recipe.train.max_overflows if self._engine.precision == "fp16" else 1
        if self._skipped_in_a_row >= limit:
            losses = self._sample_losses(step, self._accumulator.recent)
            file = self._run.job.run_dir / f"bad_step-{step + 1}.json"
            if self._run.ranks.is_main:
                self._write(file, step, losses)
            raise TinyGPTVError(self._explanation(step, losses, file))

    def on_log(self, record: LogRecord) -> None:
        """Warn of loss spikes and of steps without targets since the last log line."""
        totals, found = record.totals, 0
        for step, loss, targets in totals.steps:
            if not targets:
                LOGGER.warning("step %d had no target token on any rank: only weight decay changed weights", step + 1)
            elif (score := self._spikes.score(loss)) > SPIKE:
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
        record.metrics["train/spike"] = found

    def _sample_losses(self, step: int, recent: Sequence[Computed]) -> dict[SampleRef, float | None]:
        """Return the mean token loss of each sample of a step, from all ranks; None for one that was skipped."""
        samples = self._stream.order.step(step)
        first = step * self._stream.batch_size
        table = torch.zeros(len(samples), 2, dtype=torch.float64)
        for micro in recent:
            if micro.step == step:
                for ref, total, count in micro.sample_losses():
                    table[ref.position - first] = torch.tensor([total, count])
        rows = self._engine.all_reduce(table.to(self._engine.device)).tolist()
        return {ref: total / count if count else None for ref, (total, count) in zip(samples, rows, strict=True)}

    def _write(self, file: Path, step: int, losses: dict[SampleRef, float | None]) -> None:
        plan, ranks = self._planner.plan(step), range(self._run.ranks.world_size)
        described = {
            "step": step + 1,
            "grad_norm": str(self._engine.grad_norm()),
            "loss_scale": self._engine.loss_scale(),
            "left_out_in_a_row": self._skipped_in_a_row,
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
        if self._skipped_in_a_row > 1:
            what = (
                f"{self._skipped_in_a_row} steps in a row overflowed in fp16 (train.max_overflows). At the last, {what}"
            )
        return (
            f"{what}Weights and optimizer are as they were before it; all samples of the step are in {file}. Look at "
            "them, lower optimizer.lr or lengthen optimizer.warmup_steps, and resume from the last checkpoint"
        )


def _highest(losses: dict[SampleRef, float | None]) -> list[tuple[SampleRef, float]]:
    known = [(ref, loss) for ref, loss in losses.items() if loss is not None and not math.isnan(loss)]
    return sorted(known, key=lambda pair: pair[1], reverse=True)[:_NAMED]
