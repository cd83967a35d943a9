"""How long a checkpoint of what was trained holds up the training, and how long its writing goes on beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.machine import wait
from tinygptv_ds.train.checkpoint import FOLDER, TENSORS, write_checkpoint
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.saver import take_snapshot


def save_times(engine: Engine, step: Callable[[], object]) -> dict[str, float]:
    """Seconds, and a step's beside the writing against one alone. To be called on all ranks.

    Args:
        engine: has made a step, so that there are moments.
        step: makes one more and waits for it.
    """
    alone = _mean_seconds(step, times=3)
    stalls = []
    for _ in range(2):  # the first takes memory that the next finds
        wait(engine.device)
        began = time.perf_counter()
        snapshot = take_snapshot(engine, 1, {})
        stalls.append(time.perf_counter() - began)
    checkpoints = engine.job.run_dir / FOLDER
    with ThreadPoolExecutor(1) as thread:
        began = time.perf_counter()
        writing = thread.submit(write_checkpoint, checkpoints, snapshot) if engine.job.ranks.is_main else None
        beside = _mean_seconds(step, times=3)
        folder = writing.result() if writing is not None else None
        seconds = time.perf_counter() - began
    gigabytes = (folder / TENSORS).stat().st_size / 1e9 if folder is not None else 0.0
    return {
        "gb": gigabytes,
        "stall_seconds": stalls[-1],
        "first_stall_seconds": stalls[0],
        "write_seconds": seconds,
        "step_seconds_alone": alone,
        "step_seconds_beside": beside,
    }


def _mean_seconds(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times
