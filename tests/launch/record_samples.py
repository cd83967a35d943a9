"""Stage 4 as its script has it; each rank notes what every step is fed, and rank 1 dies of SIGKILL after KILL_AFTER."""

import json
import os
import runpy
import signal
from pathlib import Path

from tinygptv_ds.cli import run_command
from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.train import loop
from tinygptv_ds.train.run import Run

KILL_AFTER = int(os.environ.get("KILL_AFTER", -1))


def recorded(run: Run, step: int, loaded: list[MicroBatch], *rest: object) -> None:
    ids = [
        [(ref.position, ref.dataset, ref.epoch, ref.shard, ref.index) for ref in item.batch.sample_ids]
        for item in loaded
    ]
    with (run.job.run_dir / f"fed-{run.ranks.rank}.jsonl").open("a") as file:
        file.write(json.dumps([step, ids]) + "\n")
    optimizer_step(run, step, loaded, *rest)
    if step == KILL_AFTER and run.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


optimizer_step, loop.optimizer_step = loop.optimizer_step, recorded

main = runpy.run_path(str(Path(__file__).parents[2] / "stages/stage4.py"))["main"]

if __name__ == "__main__":
    run_command(main)
