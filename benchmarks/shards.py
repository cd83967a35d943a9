"""Number of shards that ranks and nodes read, by number of GPUs, at the size of the published data.

The shards are those of `stream.py`: only indexes. For each number of GPUs the steps of a real run are planned, and the
shards are counted that contain the samples of one rank, of one node and of all ranks.

    python benchmarks/shards.py [--gpus 1 8 64 512] [--steps 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.stream import make_shards, published_recipe
from tinygptv_ds.config.load import build_recipe
from tinygptv_ds.data.stream.plan import Planner, open_stream

FIRST = 100_000  # first step that is planned; any step of the run would do
MB_A_SAMPLE, MB_FEATURES = 0.060, 0.051  # a JPEG of 480 pixels with its text; 32 x 768 in bf16 with the text


def measure(folder: Path, gpus: int, per_gpu: int, node: int, steps: int) -> dict[str, float]:
    """Return the number of shards that are read in the mean step and in all steps together."""
    recipe = build_recipe(published_recipe(folder, gpus * per_gpu, per_gpu), "benchmark")
    planner = Planner(open_stream(recipe), gpus)
    readers = {"rank": 1, "node": min(node, gpus), "all": gpus}
    in_step: dict[str, list[int]] = {name: [] for name in readers}
    in_all: dict[str, set[int]] = {name: set() for name in readers}
    slowest, began = [], time.perf_counter()
    for step in range(FIRST, FIRST + steps):
        plan = planner.plan(step)
        shard = plan.samples.dataset.astype(np.int64) << 32 | plan.samples.shard
        rank = plan.packing.place % gpus
        for name, ranks in readers.items():
            seen = np.unique(shard[rank < ranks])
            in_step[name].append(len(seen))
            in_all[name].update(seen.tolist())
        slowest.append(plan.packing.imbalance(plan.cost))
    return {
        "gpus": gpus,
        "samples": gpus * per_gpu,
        **{f"{name}_shards_in_a_step": float(np.mean(counts)) for name, counts in in_step.items()},
        **{f"{name}_shards_in_all": len(seen) for name, seen in in_all.items()},
        "slowest_rank": float(np.mean(slowest)),
        "seconds": time.perf_counter() - began,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each number of GPUs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--per-gpu", type=int, default=64, help="samples of a step on one GPU (default: 64)")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node (default: 8)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=12_000)
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=120, help="samples per second of one GPU (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    print("        shards in a step: of      in all steps: of    a node reads, MB/s    fetches whole   slowest")
    print("GPUs    rank    node    all     rank   node    all   images  features   shards, MB/s      rank")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), args.shards, args.samples_per_shard)
        for gpus in args.gpus:
            row = measure(Path(folder), gpus, args.per_gpu, args.node, args.steps)
            samples_s = args.rate * min(args.node, gpus)
            seconds = args.steps * args.per_gpu / args.rate
            whole = row["node_shards_in_all"] * args.samples_per_shard * MB_A_SAMPLE / seconds
            row |= {
                "node_mb_s": samples_s * MB_A_SAMPLE,
                "features_mb_s": samples_s * MB_FEATURES,
                "fetched_mb_s": whole,
            }
            rows.append(row)
            print(
                f"{gpus:4d} {row['rank_shards_in_a_step']:7.1f} {row['node_shards_in_a_step']:7.1f} "
                f"{row['all_shards_in_a_step']:6.1f} {row['rank_shards_in_all']:8d} {row['node_shards_in_all']:6d} "
                f"{row['all_shards_in_all']:6d} {row['node_mb_s']:10.0f} {row['features_mb_s']:9.0f} {whole:14.0f} "
                f"{100 * row['slowest_rank']:+9.2f} %",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
