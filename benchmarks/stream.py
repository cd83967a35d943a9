"""Cost of the sample order at the size of the published data: start-up, memory, and time to plan a step.

The shards are empty tars of the right size, which share one index of 10,000 samples. The plans are those of a real run
of that many ranks; only indexes are read.

python benchmarks/stream.py [--shards 1000 12000] [--ranks 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.shards.index import ShardIndex
from tinygptv_ds.data.shards.members import Member
from tinygptv_ds.data.stream.plan import Planner, open_stream

SHARES = {"laion": 10_489, "cc_sbu": 1_256}  # published shards of each, and 115 : 14 of the samples
WEIGHTS = {"laion": 115, "cc_sbu": 14}
FAR = 1_000_000  # step of the resumed plan


def make_shards(folder: Path, shards: int, samples: int) -> None:
    """Write `shards` sparse tars in the published proportion, with indexes that are links to one file."""
    rng = np.random.default_rng(0)
    rows = [
        (f"{i:09d}", [Member(s, 60_000 * i + 20_000 * n, 18_000) for n, s in enumerate(("jpg", "json", "txt"))])
        for i in range(samples)
    ]
    lengths = np.stack([np.ones(samples), np.zeros(samples), rng.integers(5, 40, samples)], axis=1).astype(np.uint16)
    size, mtime = 60_000 * samples, 1_700_000_000 * 10**9
    shared = folder / "shared.idx"
    shared.write_bytes(ShardIndex(rows, lengths).to_bytes((size, mtime)))
    for name, share in SHARES.items():
        (folder / name).mkdir()
        for number in range(max(1, round(shards * share / sum(SHARES.values())))):
            tar = folder / name / f"{number:05d}.tar"
            with tar.open("wb") as file:
                file.truncate(size)
            os.utime(tar, ns=(mtime, mtime))
            tar.with_name(f"{tar.name}.idx").symlink_to(shared)


def measure(folder: Path, ranks: int, per_rank: int, steps: int) -> dict[str, float]:
    """Open the stream and plan steps as one rank's loader does; the memory is right only in a new process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recipe = build_recipe(published_recipe(folder, ranks * per_rank, per_rank), "benchmark")
    start = time.perf_counter()
    stream = open_stream(recipe)
    opened = time.perf_counter() - start
    planner = Planner(stream, ranks)
    first, far = _seconds(planner, 0), _seconds(planner, FAR)
    later = [_seconds(planner, FAR + step) for step in range(1, steps + 1)]
    plan = planner.plan(FAR)
    shares = np.concatenate([plan.packing.rank_share(rank) for rank in range(ranks)])
    assert np.array_equal(np.sort(shares), np.arange(ranks * per_rank)), "the ranks' shares are not the step"
    return {
        "samples": float(sum(len(order) for order in stream.orders.values())),
        "start_seconds": opened,
        "first_plan_seconds": first,
        "resumed_plan_seconds": far,
        "plan_seconds": statistics.median(later),
        "memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "imbalance": plan.packing.imbalance(plan.cost),
    }


def _seconds(planner: Planner, step: int) -> float:
    start = time.perf_counter()
    planner.plan(step)
    return time.perf_counter() - start


def published_recipe(folder: Path, batch_size: int, micro_batch_size: int) -> dict:
    """Return the recipe of stage 1 on the shards of `make_shards`."""
    datasets = [{"name": name, "shards": str(folder / name), "weight": weight} for name, weight in WEIGHTS.items()]
    return {
        "stage": 1,
        "model": {"phi": "-", "eva_vit": "-", "qformer": "-"},
        "data": {"datasets": datasets},
        "optimizer": {"lr": 1e-4, "min_lr": 8e-5},
        "train": {"batch_size": batch_size, "micro_batch_size": micro_batch_size},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each size in its own process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 12_000])
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--per-rank", type=int, default=64, help="samples of a step on one rank (default: 64)")
    parser.add_argument("--steps", type=int, default=20, help="steps to plan for the median")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # set in the process that measures this folder
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, args.ranks, args.per_rank, args.steps)))
        return
    rows = []
    print("shards     samples  start-up   first plan  resumed plan  later plans   memory  slowest rank")
    for shards in args.shards:
        with tempfile.TemporaryDirectory() as folder:
            make_shards(Path(folder), shards, args.samples_per_shard)
            options = ["--ranks", args.ranks, "--per-rank", args.per_rank, "--steps", args.steps, "--one", folder]
            command = [sys.executable, __file__, *map(str, options)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"shards": shards, "ranks": args.ranks, **row})
        print(
            f"{shards:6d} {row['samples']:11,.0f} {row['start_seconds']:7.2f} s {1e3 * row['first_plan_seconds']:9.0f} "
            f"ms {1e3 * row['resumed_plan_seconds']:10.0f} ms {1e3 * row['plan_seconds']:9.1f} ms "
            f"{row['memory_mb']:5.0f} MB {100 * row['imbalance']:+10.2f} %"
        )
    if args.json:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        args.json.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
