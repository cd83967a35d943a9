"""The end of a dry run: a checkpoint to measure, a report, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.checkpoint.folders import FOLDER
from tinygptv_ds.train.checkpoint.snapshot import take_snapshot
from tinygptv_ds.train.checkpoint.storage import write_checkpoint
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.setup.job import DRY_SUFFIX


def finish_dry_run(run: Run) -> None:
    """Save a checkpoint, report time, memory and what a run would write, and remove what was written.

    Call on all ranks, after the stage has saved its result.
    """
    job = run.job
    start = time.perf_counter()
    snapshot = take_snapshot(run.engine, job.last_step, batch_size=job.recipe.train.batch_size, fingerprint={})
    if job.ranks.is_main:
        write_checkpoint(job.run_dir / FOLDER, snapshot)
        seconds = time.perf_counter() - start
        for line in _report(run, seconds):
            LOGGER.info("%s", line)
        shutil.rmtree(job.run_dir)


def _report(run: Run, seconds: float) -> list[str]:
    job = run.job
    train, run_dir = job.recipe.train, job.run_dir
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line]  # the others hold validation losses
    last = steps[-1]
    count = sum(parameter.requires_grad for parameter in run.engine.module.parameters())
    hours = train.total_steps * last["perf/step_seconds"] / 3600
    checkpoint, result = _megabytes(run_dir / "checkpoints"), _megabytes(run_dir / "model")
    every = f"every {train.checkpoint_every} steps" if train.checkpoint_every else "none before the end"
    return [
        f"dry run: {job.last_step} of {train.total_steps} steps done, losses "
        f"{', '.join(format(step['train/loss'], '.4f') for step in steps)}; {count} tensors trained",
        f"time: {last['perf/step_seconds']:.3f} s for the last step ({last['perf/samples_s']:.1f} samples/s, "
        f"first steps are slow), so {hours:.1f} hours at most for all",
        f"memory: {last['perf/mem_gib']:.2f} GiB at its peak on rank 0",
        f"a run would write to {run_dir.with_name(run_dir.name.removesuffix(DRY_SUFFIX))}: log and metrics; "
        f"checkpoints of {checkpoint:.3f} MB ({every}, {train.keep_checkpoints} kept, {seconds:.1f} s each); model/ of "
        f"{result:.3f} MB",
        f"nothing was kept: {run_dir} is removed",
    ]


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
