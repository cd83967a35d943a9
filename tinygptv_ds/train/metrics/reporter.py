"""Reports of a run: console, TensorBoard, `metrics.jsonl`, trackers, and the rank that holds up the others."""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tinygptv_ds.board_tags import board_tag
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.files import write_atomically
from tinygptv_ds.log import LOGGER, log_with_head
from tinygptv_ds.models.compiler import compile_obstacle
from tinygptv_ds.models.flops import FlopRates, peak_flops, step_flops
from tinygptv_ds.models.launches import WAITS_FOR_HOST, remedy
from tinygptv_ds.train.callbacks.callback import LogRecord
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.metrics.accumulator import RankTimes, Totals
from tinygptv_ds.train.metrics.board import describe_run, open_board
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.setup.job import Job
from tinygptv_ds.train.trackers.opening import Trackers, open_trackers

# Per cent of the GPU's time for forward passes from which on the host sets the pace. A host that runs ahead of the GPU
# needs less: it has launched all of a pass when the GPU is in the middle of it.
_WAITING = 90.0
_LAG = 0.1  # of the time of a step: what the others may lose to one rank before it is named


class Reporter:
    """Rank 0's console line, TensorBoard, `metrics.jsonl` and trackers; it does nothing on other ranks.

    With `--evaluate-only` it writes nothing: the metrics of the run stay as they are.

    Attributes:
        board: TensorBoard's writer on rank 0, None elsewhere.
    """

    def __init__(self, run: Run) -> None:
        job, first_step, total_steps = run.job, run.first_step, run.job.last_step
        self._job = job
        self._clock = run.clock
        self._device = run.engine.device
        self._costs, self._peak = _costs(run), _peak(run.engine)
        self.board: SummaryWriter | None = None
        self._trackers = Trackers([])
        self._remedy = _remedy(job)
        self._has_waited = False  # the GPU for the host: reported once
        self._torn = False  # the last line of metrics.jsonl may not be whole
        if job.ranks.is_main and not job.evaluate_only:
            forget_after(job.run_dir / "metrics.jsonl", first_step)
            purge = first_step + 1 if first_step else None
            self.board = open_board(job.run_dir / "tensorboard", purge)
            self._trackers = open_trackers(job.recipe, job.run_dir)
            if not first_step:
                describe_run(self.board, job)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=f"stage {job.recipe.stage}",
            unit="step",
            disable=None if job.ranks.is_main else True,
            dynamic_ncols=True,
        )
        _use_monotonic_clock(self._bar)
        self._first, self._total = first_step, total_steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close all outputs; after an error or a signal the trackers alone."""
        if kind is None:
            self._close()
        else:
            self._trackers.finish(completed=False)

    def step_done(self) -> None:
        """Move the progress bar."""
        self._bar.update()

    def is_due(self, done: int) -> bool:
        """Return whether a line is due after `done` steps; after the first one and the last it always is."""
        return done in (self._first + 1, self._total) or done % self._job.recipe.train.log_every == 0

    def log(self, record: LogRecord) -> None:
        """Write one line, with the speed since the last one."""
        seconds = self._clock.read()
        if self.board is None:
            return
        step, totals = record.step, record.totals
        perf = rates(totals, seconds, self._costs, self._peak) | {"perf/mem_gib": memory_gib(self._device)}
        self.scalars(step, training_scalars(totals) | record.metrics | perf)
        straggler = straggling(totals.ranks, seconds)
        self._report_waiting_gpu(record)
        remaining = (self._total - step) * perf["perf/step_seconds"]
        parts = [
            f"loss {totals.loss:.4f}",
            f"lr {record.metrics['train/lr']:.2e}",
            f"grad norm {record.metrics['train/grad_norm']:.3f}",
            f"{perf['perf/samples_s']:.1f} samples/s",
            f"{perf['perf/target_tokens_s']:.0f} target tokens/s",
            f"MFU {perf['perf/mfu']:.0f} %" if "perf/mfu" in perf else "MFU -",
            f"data wait {perf['perf/data_wait_pct']:.0f} %",
            f"{perf['perf/mem_gib']:.1f} GiB",
            f"ETA {_clock_time(remaining)}",
            *([straggler] if straggler else []),
            *record.remarks,
        ]
        self._bar.set_postfix(loss=f"{totals.loss:.3f}", sps=f"{perf['perf/samples_s']:.0f}", refresh=False)
        log_with_head(f"step {step}/{self._total}", " | ".join(["", *parts]))

    def _report_waiting_gpu(self, record: LogRecord) -> None:
        """Report once that the GPU waits for the host, with what helps; the first step, a warm-up, is no sign of it."""
        launching = record.metrics["perf/host_pct"]
        if self._device.type != "cuda" or self._has_waited or record.step <= self._first + 1 or launching < _WAITING:
            return
        self._has_waited = True
        LOGGER.warning(
            "%s, which takes %.0f %% of the GPU's time for the forward passes to launch them; what helps: %s",
            WAITS_FOR_HOST,
            launching,
            self._remedy,
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write values everywhere, on TensorBoard under their tags; not finite ones become null in `metrics.jsonl`."""
        if self.board is None or not values:
            return
        for name, value in values.items():
            self.board.add_scalar(board_tag(name), value, step)
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(json.dumps({"step": step, "time": time.time(), **line}))
        self._trackers.log(values, step)

    def _append(self, line: str) -> None:
        """Add a line to metrics.jsonl; a full disk costs lines of it and not the run."""
        path = self._job.run_dir / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._torn else "") + line + "\n")
            self._torn = False
        except OSError as error:
            if not self._torn:
                LOGGER.warning("%s cannot be written (%s); training continues without it", path, error.strerror)
            self._torn = True

    def _close(self) -> None:
        """Flush and close all outputs."""
        self._bar.close()
        if self.board is not None:
            self.board.close()
        self._trackers.finish(completed=True)


def _remedy(job: Job) -> str:
    """Return what is left to do where the GPU waits for the host."""
    recipe, model = job.recipe, job.recipe.model
    return remedy(
        from_features=recipe.data.features is not None,
        compiled=model.compile is not False or compile_obstacle(job.zero_stage, model.frozen_bits) is not None,
        graphs=recipe.train.cuda_graph_tokens > 0 or job.ranks.world_size > 1,
    )


def _use_monotonic_clock(bar: Any) -> None:
    """Let a progress bar not stop when the clock is set back. Remove when tqdm does without the time of the day."""
    bar._time = time.monotonic
    bar.start_t = bar.last_print_t = time.monotonic()


def training_scalars(totals: Totals) -> dict[str, float]:
    """Return losses, samples skipped, and what each dataset contributed, by name.

    That is its share in per cent, and its samples with an image and without.
    """
    scalars = {"train/loss": totals.loss}
    scalars |= {f"train/loss_{name}": loss for name, loss in totals.loss_by_dataset.items()}
    scalars["data/skipped"] = sum(totals.skipped.values())
    scalars |= {f"data/skipped_{reason}": count for reason, count in totals.skipped.items()}
    for name, count in totals.with_images.items():
        scalars |= {f"data/with_image_{name}": count, f"data/text_only_{name}": totals.samples[name] - count}
    used = max(sum(totals.samples.values()), 1)
    return scalars | {f"data/mix_{name}": 100 * count / used for name, count in totals.samples.items()}


def rates(totals: Totals, seconds: float, costs: FlopRates, peak: float | None) -> dict[str, float]:
    """Return the speed since the last line under `perf/`.

    Args:
        totals: since the last line.
        seconds: that it took.
        costs: operations of a step by what is counted.
        peak: operations a second that one rank's device can do; None: unknown, and there is no MFU.

    Returns:
        `samples_s`, `tokens_s` and `target_tokens_s` of all ranks; `step_seconds`; `tflops` of a rank, and `mfu`, the
        per cent of its peak, by the work that frozen parts really are; `data_wait_pct` (mean over the ranks) and
        `data_wait_max_pct`; `slowest_rank`, and `slowest_seconds`, its data wait and forward passes a step.
    """
    steps, ranks = max(len(totals.steps), 1), totals.ranks
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].own)
    waits = [100 * times.data_wait / seconds for times in ranks]
    done = costs.of(totals.work) / seconds / len(ranks)
    found = {
        "samples_s": sum(totals.samples.values()) / seconds,
        "tokens_s": totals.work.tokens / seconds,
        "target_tokens_s": totals.work.targets / seconds,
        "step_seconds": seconds / steps,
        "tflops": done / 1e12,
        "data_wait_pct": statistics.fmean(waits),
        "data_wait_max_pct": max(waits),
        "slowest_rank": slowest,
        "slowest_seconds": ranks[slowest].own / steps,
    }
    if peak is not None:
        found["mfu"] = 100 * done / peak
    return {f"perf/{name}": value for name, value in found.items()}


def straggling(ranks: list[RankTimes], seconds: float) -> str | None:
    """Name the rank that the others wait for, if that costs them more than a tenth of the time.

    Each rank's own seconds, data wait and forward passes, are compared with the median of the others'. Under ZeRO-3
    ranks wait for each other inside their forward passes too, so that there mainly data waits show.
    """
    if len(ranks) < 2:
        return None
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].own)
    others = [times for rank, times in enumerate(ranks) if rank != slowest]
    if ranks[slowest].own - statistics.median(times.own for times in others) <= _LAG * seconds:
        return None
    wait, forward = (
        f"{100 * getattr(ranks[slowest], part) / seconds:.0f} % "
        f"({100 * statistics.median(getattr(times, part) for times in others) / seconds:.0f} %)"
        for part in ("data_wait", "forward")
    )
    return f"rank {slowest} holds up the others: data wait {wait}, forward passes {forward} (the others' median)"


def _costs(run: Run) -> FlopRates:
    trained = [name for name, _ in run.engine.trained_parameters()]
    return step_flops(run.engine.module.config, trained, from_features=run.recipe.data.features is not None)


def _peak(engine: Engine) -> float | None:
    if engine.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(engine.device), engine.precision)


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again, and lines that a crash has damaged.

    Raises:
        ConfigError: the file cannot be read or written.
    """
    if not metrics.exists():
        return
    try:
        lines = metrics.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        damaged = sum(found is None for found in steps)
        if damaged:
            LOGGER.warning("%s: %d damaged line(s) dropped", metrics, damaged)
        kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
        if kept != lines:
            write_atomically(metrics, b"".join(kept))
    except OSError as error:
        raise ConfigError(f"{metrics} cannot be used ({error.strerror}); make room, or move it away") from None


def _step_of(line: bytes) -> int | None:
    """Return the step of a line; None: it is not whole."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def memory_gib(device: torch.device) -> float:
    """Return this rank's peak memory so far: the GPU's, or the process's own on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
