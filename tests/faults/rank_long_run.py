"""A fault for `forked.started`: a rank notes what it holds; the ranks themselves import it."""

import gc
import json
import os
from pathlib import Path

from tinygptv_ds.processes import children_of
from tinygptv_ds.train import loop
from tinygptv_ds.train.run import Run


def measured(at: tuple[range, ...]) -> None:
    """Note in these steps, from 0, the memory of this process and its open files, threads and dataloader workers."""
    optimizer_step = loop.optimizer_step

    def noted(training: Run, step: int, *rest: object) -> None:
        optimizer_step(training, step, *rest)
        if any(step in steps for steps in at):
            gc.collect()
            workers = [pid for pid in children_of(os.getpid()) if _files(pid)]
            held = {"step": step, "rss": _resident(os.getpid()), "files": _files(os.getpid()), "workers": len(workers)}
            held |= {"worker_rss": max(map(_resident, workers)), "worker_files": max(map(_files, workers))}
            held["threads"] = len(list(Path("/proc/self/task").iterdir()))
            with (training.job.run_dir / "held.jsonl").open("a") as file:
                file.write(json.dumps(held) + "\n")

    loop.optimizer_step = noted


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _files(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0
