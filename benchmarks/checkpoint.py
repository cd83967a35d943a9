"""Time that training waits for a checkpoint, time of writing it in the background, and time of resuming from it.

A real engine on one rank trains random values for the 45 M trainable parameters of the published stages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.made_up import SIZES, random
from tinygptv_ds.config.deepspeed import load_deepspeed_json, resolve_deepspeed
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.distributed import ranks_from_env
from tinygptv_ds.files import sha256, whole_folder
from tinygptv_ds.models.parameters import is_trainable
from tinygptv_ds.resources import project_root
from tinygptv_ds.train.checkpoint.resume import load_weights, open_checkpoint
from tinygptv_ds.train.checkpoint.snapshot import take_snapshot
from tinygptv_ds.train.checkpoint.storage import STATE, TENSORS, Snapshot, read_state, write_checkpoint
from tinygptv_ds.train.engine import MOMENTS, Engine
from tinygptv_ds.train.setup.job import Job, default_deepspeed_json
from tinygptv_ds.train.setup.session import join_ranks
from tinygptv_ds.weights.assemble import meta_model


class Trained(nn.Module):
    """The trainable parameters of a model without the rest of it; its loss is nearly zero."""

    def __init__(self, size: str) -> None:
        super().__init__()
        shapes = {name: tuple(p.shape) for name, p in meta_model(SIZES[size]).named_parameters() if is_trainable(name)}
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(random(shape, torch.float32)))
        self.visual_encoder = nn.Linear(1, 1).requires_grad_(False)  # the engine looks at its dtype

    def forward(self) -> Tensor:
        """Return a loss that gives every parameter a gradient."""
        return torch.stack([parameter.sum() for parameter in self.parameters() if parameter.requires_grad]).sum() * 1e-6


def start(run_dir: Path, size: str) -> Engine:
    """Return an engine that has made a step, so that there are moments."""
    recipe = load_recipe(project_root() / "stages/stage4.yaml", ["train.batch_size=1", "train.micro_batch_size=1"])
    path = default_deepspeed_json()
    config = resolve_deepspeed(load_deepspeed_json(path), recipe, 1, str(path))
    job = Job(recipe, config, run_dir, "never", ranks_from_env())
    join_ranks(job)
    model: Any = Trained(size)  # takes the place of the whole model: an engine needs its trained parameters alone
    model.attention, model.vision_is_frozen = "auto", True
    engine = Engine(model, job.deepspeed, recipe.optimizer, job.ranks)
    engine.set_boundary(True)
    engine.backward(engine.deepspeed())
    engine.step()
    return engine


def synchronous(engine: Engine, folder: Path) -> None:
    """Save in the usual way: training waits, safetensors writes, and the hash is taken from the file."""
    snapshot = take_snapshot(engine, 1, batch_size=1, fingerprint={})
    with whole_folder(folder) as partial_folder:
        save_file(dict(snapshot.tensors), partial_folder / TENSORS)
        state = {**snapshot.state, "sha256": sha256(partial_folder / TENSORS)}
        (partial_folder / STATE).write_text(json.dumps(state))


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def work_rate(until: Callable[[], bool]) -> float:
    """Return the matrix products per second of this thread, which represent training during the writing."""
    a = torch.randn(256, 256)
    began, count = time.perf_counter(), 0
    while not until():
        a @ a
        count += 1
    return count / (time.perf_counter() - began)


def measure(size: str, rounds: int, folder: Path) -> dict[str, float]:
    """Return medians over the rounds; the two ways take turns."""
    engine = start(folder / "run", size)
    rows = [one_round(engine, folder, number + 1) for number in range(rounds)]
    size_gb = (folder / f"run/checkpoints/step-{1:08d}" / TENSORS).stat().st_size / 1e9
    torch.distributed.destroy_process_group()
    return {"gb": size_gb} | {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def one_round(engine: Engine, folder: Path, number: int) -> dict[str, float]:
    """Return the times of both ways of saving, and of resuming from the checkpoint of the second."""
    row = {"synchronous_seconds": seconds(partial(synchronous, engine, folder / "old"))}
    snapshots: list[Snapshot] = []
    row["stall_seconds"] = seconds(
        lambda: snapshots.append(take_snapshot(engine, number, batch_size=1, fingerprint={}))
    )
    end = time.perf_counter() + 1.0
    alone = work_rate(lambda: time.perf_counter() > end)
    write = partial(write_checkpoint, folder / "run/checkpoints", snapshots[0])
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(seconds, write)
        row["work_meanwhile"] = work_rate(writing.done) / alone
        row["write_seconds"] = writing.result()
    return row | resume_times(engine, folder / "run/checkpoints" / snapshots[0].name)


def resume_times(engine: Engine, folder: Path) -> dict[str, float]:
    """Return the times of verifying every file's hash and of loading weights and moments into model and optimizer."""
    verify = seconds(lambda: read_state(folder))

    def load() -> None:
        checkpoint = open_checkpoint(folder)
        load_weights(engine.module, checkpoint)
        for moment in MOMENTS:
            engine.set_moments(moment, partial(checkpoint.tensor, moment))

    return {"verify_seconds": verify, "load_seconds": seconds(load)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="published")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="an existing folder to write in (default: the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = measure(args.size, args.rounds, Path(folder))
    print(f"checkpoint of {row['gb']:.2f} GB                      seconds")
    print(f"training waits, all at once              {row['synchronous_seconds']:8.2f}")
    print(f"training waits, snapshot alone           {row['stall_seconds']:8.2f}")
    print(f"writing, hashing, syncing next to it      {row['write_seconds']:8.2f}")
    print(f"  meanwhile the training thread does     {100 * row['work_meanwhile']:8.0f} % of its work")
    print(f"resume: verify the hash of every file    {row['verify_seconds']:8.2f}")
    print(f"resume: load weights and moments         {row['load_seconds']:8.2f}")
    if args.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": str(torch.__version__)}
        args.json.write_text(json.dumps({**machine, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
