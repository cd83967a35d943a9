"""The command ``stream``: the samples of a run, one JSON line each. Neither torch nor a GPU is needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tinygptv_ds.config.load import add_recipe_arguments, load_recipe
from tinygptv_ds.data.process_pool import WorkerPool
from tinygptv_ds.data.stream.mixture import SampleRef
from tinygptv_ds.data.stream.plan import Planner, open_stream
from tinygptv_ds.errors import ConfigError


@dataclass(frozen=True)
class Steps:
    """The samples of each step, as lines; picklable, so that several processes can share the work.

    Attributes:
        planner: distributes the steps over the ranks.
        rank: show only this one's; None: all.
    """

    planner: Planner
    rank: int | None

    def lines(self, step: int) -> str:
        """Return the samples of a step in the order of the stream, one line each."""
        return "".join(self._line(step, ref) for ref in self._samples(step))

    def _samples(self, step: int) -> list[SampleRef]:
        plan = self.planner.plan(step)
        ranks = range(self.planner.world_size) if self.rank is None else [self.rank]
        micro_batches = range(plan.packing.micro_batches)
        shares = [plan.micro_batch(number, rank) for rank in ranks for number in micro_batches]
        return sorted((ref for share in shares for ref in share), key=lambda ref: ref.position)

    def _line(self, step: int, ref: SampleRef) -> str:
        shard = str(self.planner.stream.shards[ref.dataset][ref.shard])
        line = {"step": step, "position": ref.position, "dataset": ref.dataset, "shard": shard, "index": ref.index}
        return json.dumps(line, ensure_ascii=False) + "\n"


def show(steps: Steps, first: int, last: int, workers: int) -> Iterator[str]:
    """Yield the lines of steps `first` to `last` - 1 in order, computed here or by `workers` processes."""
    if workers == 0:
        yield from map(steps.lines, range(first, last))
        return
    with WorkerPool(workers, remedy="use fewer --workers") as pool:
        yield from pool.map(steps.lines, range(first, last))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``stream``."""
    add_recipe_arguments(parser)
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="optimizer steps to show (default: 1)")
    parser.add_argument("--start-step", type=int, default=0, metavar="S", help="the first of them (default: 0)")
    parser.add_argument("--world-size", type=int, default=1, metavar="R", help="ranks of the run (default: 1)")
    parser.add_argument("--workers", type=int, default=0, metavar="W", help="processes that compute steps (default: 0)")
    parser.add_argument("--rank", type=int, metavar="r", help="show only what this rank computes")
    parser.add_argument("--held-out", action="store_true", help="the samples that data.validation_share keeps back")


def run(args: argparse.Namespace) -> None:
    """Run ``stream``."""
    _check(args)
    recipe = load_recipe(args.recipe, args.set)
    if args.held_out and not recipe.data.validation_share:
        raise ConfigError("--held-out: data.validation_share is 0, so nothing is held out")
    stream = open_stream(recipe, held_out=args.held_out)
    if args.rank is not None:
        recipe.train.accumulation(args.world_size)  # an error where the batch does not divide
    steps = Steps(Planner(stream, args.world_size), args.rank)
    for lines in show(steps, args.start_step, args.start_step + args.steps, args.workers):
        sys.stdout.write(lines)


def _check(args: argparse.Namespace) -> None:
    if args.world_size < 1 or args.steps < 0 or args.start_step < 0 or args.workers < 0:
        raise ConfigError("--world-size must be at least 1; --steps, --start-step and --workers 0 or more")
    if args.rank is not None and not 0 <= args.rank < args.world_size:
        raise ConfigError(f"--rank {args.rank}: with --world-size {args.world_size} ranks go to {args.world_size - 1}")
