"""Sums kept on the device between log lines, and what is made of them: console, TensorBoard, JSON lines."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tinygptv_ds.data.batch import Batch
from tinygptv_ds.data.reader import REASONS
from tinygptv_ds.log import LOGGER, note
from tinygptv_ds.train.engine import Engine


class Sums:
    """Loss and counts since the last log line. Nothing here waits for the device until `read`.

    The vector holds, per dataset, the sum of token losses and the number of target tokens, then the samples used, then
    the samples skipped for each of `REASONS`.
    """

    def __init__(self, engine: Engine, datasets: list[str]) -> None:
        self._engine = engine
        self._datasets = datasets
        self._values = torch.zeros(2 * len(datasets) + 1 + len(REASONS), dtype=torch.float64, device=engine.device)

    def add(self, batch: Batch, token_losses: Tensor, skipped: list[str]) -> None:
        """Count one micro-batch; `skipped` are the reasons for which samples dropped out of it."""
        losses = token_losses.detach().double()
        self._values.index_add_(0, batch.target_dataset, losses)
        self._values.index_add_(0, batch.target_dataset + len(self._datasets), torch.ones_like(losses))
        n = 2 * len(self._datasets)
        self._values[n] += len(batch.sample_ids)
        for reason in skipped:
            self._values[n + 1 + REASONS.index(reason)] += 1

    def read(self) -> dict[str, Any]:
        """Totals over all ranks, which are then set back to zero. To be called on all ranks."""
        totals = self._engine.all_reduce(self._values).tolist()
        self._values.zero_()
        n = len(self._datasets)
        sums, used, skipped = totals[: 2 * n], totals[2 * n], totals[2 * n + 1 :]
        tokens = sum(sums[n:])
        by_dataset = {name: sums[i] / sums[n + i] for i, name in enumerate(self._datasets) if sums[n + i]}
        return {
            "loss": sum(sums[:n]) / max(tokens, 1),
            "loss_by_dataset": by_dataset,
            "target_tokens": tokens,
            "samples": used,
            "skipped": {reason: int(count) for reason, count in zip(REASONS, skipped, strict=True) if count},
        }


class Reporter:
    """Rank 0's console line, TensorBoard and `metrics.jsonl`; the other ranks' does nothing."""

    def __init__(self, engine: Engine, total_steps: int, first_step: int) -> None:
        self._run_dir: Path = engine.job.run_dir
        self._main = engine.job.ranks.is_main
        self._device = engine.device
        self._clock = time.perf_counter()
        self.board = None
        if self._main:
            forget_after(self._run_dir / "metrics.jsonl", first_step)
            self.board = SummaryWriter(self._run_dir / "tensorboard", purge_step=first_step + 1 if first_step else None)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=f"stage {engine.job.recipe.stage}",
            unit="step",
            disable=None if self._main else True,
            dynamic_ncols=True,
        )
        self._plain_lines = self._main and self._bar.disable
        self._total = total_steps

    def step_done(self) -> None:
        """Move the bar."""
        self._bar.update()

    def log(
        self, step: int, totals: dict[str, Any], figures: dict[str, float], data_wait: float, steps: int, skips: str
    ) -> None:
        """Write one line.

        Args:
            step: steps done.
            totals: from `Sums.read`.
            figures: learning rate, gradient norm, loss scale, skipped optimizer steps.
            data_wait: seconds that this rank waited for data since the last line.
            steps: steps since the last line.
            skips: samples that dropped out so far, by reason; empty: none.
        """
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if not self._main:
            return
        rates = {
            "perf/samples_per_second": totals["samples"] / seconds,
            "perf/target_tokens_per_second": totals["target_tokens"] / seconds,
            "perf/step_seconds": seconds / steps,
            "perf/data_wait_share": data_wait / seconds,
            "perf/memory_gib": memory_gib(self._device),
            "data/skipped": sum(totals["skipped"].values()),
        }
        rates |= {f"data/skipped_{reason}": count for reason, count in totals["skipped"].items()}
        scalars = {"train/loss": totals["loss"], **{f"train/{k}": v for k, v in figures.items()}, **rates}
        scalars |= {f"train/loss_{name}": loss for name, loss in totals["loss_by_dataset"].items()}
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        with (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **scalars}) + "\n")
        remaining = (self._total - step) * seconds / steps
        line = (
            f"step {step}/{self._total} | loss {totals['loss']:.4f} | lr {figures['lr']:.2e} | "
            f"grad norm {figures['grad_norm']:.3f} | {rates['perf/samples_per_second']:.1f} samples/s | "
            f"data wait {100 * rates['perf/data_wait_share']:.0f} % | {rates['perf/memory_gib']:.1f} GiB | "
            f"ETA {_clock_time(remaining)}" + (f" | skipped so far: {skips}" if skips else "")
        )
        self._bar.set_postfix(
            loss=f"{totals['loss']:.3f}", sps=f"{rates['perf/samples_per_second']:.0f}", refresh=False
        )
        if self._plain_lines:
            LOGGER.info(line)
        else:
            note(line)

    def close(self) -> None:
        """Flush and close."""
        self._bar.close()
        if self.board is not None:
            self.board.close()


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again."""
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        metrics.write_text("".join(kept), encoding="utf-8")


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: the GPU's, or the process's own on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
