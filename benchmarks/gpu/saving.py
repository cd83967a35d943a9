"""Time that training waits for a checkpoint, and time of writing it in the background."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.machine import wait
from tinygptv_ds.train.checkpoint.folders import FOLDER
from tinygptv_ds.train.checkpoint.snapshot import take_snapshot
from tinygptv_ds.train.checkpoint.storage import TENSORS, Snapshot, write_checkpoint
from tinygptv_ds.train.run import Run


def save_times(run: Run, step: Callable[[], object]) -> dict[str, float]:
    """Return the times of a checkpoint and of a step during the writing and without it. Call it on all ranks.

    Args:
        run: has made a step, so that there are moments.
        step: makes one more and waits for it.
    """
    alone = _mean_seconds(step, times=3)
    stalls = []
    for _ in range(2):  # the first one allocates memory that the next one reuses
        wait(run.engine.device)
        began = time.perf_counter()
        snapshot = take_snapshot(run.engine, 1, batch_size=1, fingerprint={})
        stalls.append(time.perf_counter() - began)
    checkpoints = run.job.run_dir / FOLDER
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(_write, checkpoints, snapshot) if run.ranks.is_main else None
        while_writing = _mean_seconds(step, times=3)
        seconds, size = writing.result() if writing is not None else (0.0, 0)
    return {
        "gb": size / 1e9,
        "stall_seconds": stalls[-1],
        "first_stall_seconds": stalls[0],
        "write_seconds": seconds,
        "step_seconds_alone": alone,
        "step_seconds_while_writing": while_writing,
    }


def _write(checkpoints: Path, snapshot: Snapshot) -> tuple[float, int]:
    """Write a checkpoint; return the seconds and the bytes of its tensors."""
    began = time.perf_counter()
    folder = write_checkpoint(checkpoints, snapshot)
    return time.perf_counter() - began, (folder / TENSORS).stat().st_size


def _mean_seconds(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times
