"""The measuring process: the cases of a group on one engine, with steps as the training loop runs them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import wait
from benchmarks.gpu.model import DATASET, Batches, build, make_batches, model_config, overrides
from benchmarks.gpu.parts import parts_of
from benchmarks.gpu.plan import COMPILED, FP8, GRAPHS, QUANTIZED, SIZES, Case
from benchmarks.gpu.profile import profiled
from benchmarks.gpu.results import MEASURED, OUT_OF_MEMORY, add
from benchmarks.gpu.saving import save_times
from tinygptv_ds.cli import run_command
from tinygptv_ds.config.deepspeed import load_deepspeed_json, resolve_deepspeed
from tinygptv_ds.config.load import load_recipe
from tinygptv_ds.distributed import ranks_from_env
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.errors import ConfigError
from tinygptv_ds.estimate.memory import GIB, MicroBatchSize, step_memory
from tinygptv_ds.estimate.model_size import parameter_counts, parameter_shapes, quantized_weights, trained_parts
from tinygptv_ds.models.flops import peak_flops, step_flops
from tinygptv_ds.models.regions import compile_blocks
from tinygptv_ds.resources import project_root
from tinygptv_ds.train.callbacks.checkpoints import Checkpoints
from tinygptv_ds.train.cuda_graphs import start_graphs
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.liveness.group_timeout import set_group_timeout
from tinygptv_ds.train.liveness.progress import Progress
from tinygptv_ds.train.metrics.accumulator import Accumulator, RankTimes
from tinygptv_ds.train.metrics.reporter import memory_gib, rates
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.setup.job import Job
from tinygptv_ds.train.setup.session import join_ranks
from tinygptv_ds.train.step import optimizer_step
from tinygptv_ds.train.transfer import Transfer

CAPTURING = 12  # steps until every batch has come twice and its graph is captured
GRAPH_TOKENS = 4096  # more than 16 samples of stage 4 have
WARM_UP, BY_PART, PROFILED = 3, 3, 2  # numbers of steps; those by part and those profiled come after the timed ones


def make_job(case: Case, size: str, run_dir: Path) -> Job:
    """Return the job that a stage makes from its command line, without looking for weights or data."""
    ranks = ranks_from_env()
    batch = [f"train.micro_batch_size={case.batch}", f"train.batch_size={case.batch * ranks.world_size}"]
    steps = ["optimizer.warmup_steps=0", "train.checkpoint_every=0", "train.max_overflows=1000"]
    recipe = load_recipe(
        project_root() / f"stages/stage{case.stage}.yaml", [*overrides(case.stage, size), *batch, *steps]
    )
    path = project_root() / f"ds_configs/zero{case.zero}_{case.precision}.json"
    raw = load_deepspeed_json(path)
    if size == "tiny" and case.zero == 3:
        raw["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # otherwise no parameter would be divided
    return Job(recipe, resolve_deepspeed(raw, recipe, ranks.world_size, str(path)), run_dir, "never", ranks)


class Bench:
    """Steps of cases on an engine, and their figures.

    Args:
        run: with the engine of the group.
        timed: how many steps are timed. Always as many: cases under ZeRO-2 and ZeRO-3 are then alike step by step.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints, timed: int) -> None:
        self._run, self._engine = run, run.engine
        self._checkpoints = checkpoints
        self._timed = timed
        self._accumulator, self._transfer = Accumulator(run.engine, [DATASET]), Transfer(run.engine.device)
        self._done = 0

    def measure(self, case: Case) -> dict[str, Any]:
        """Return the figures of a case, which are equal on all ranks except for memory."""
        engine = self._engine
        model, rank, before = engine.module, engine.ranks.rank, self._done
        model.language_model.model.gradient_checkpointing = int(case.recompute)
        batches = make_batches(model.config, case, rank, pinned=engine.device.type == "cuda")
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(engine.device)
        warm = self.run(batches, CAPTURING if case.lever == GRAPHS else WARM_UP)
        timed = self.run(batches, self._timed)
        memory = self._memory()
        by_part = parts_of(engine, lambda: self.run(batches, BY_PART), BY_PART)
        kernels = profiled(lambda: self.run(batches, PROFILED), PROFILED, engine.device)
        figures = timed["rates"](self._costs(case), self._peak())
        return {
            "case": asdict(case),
            "status": MEASURED,
            "steps_before": before,
            "steps": self._timed,
            "losses": warm["losses"] + timed["losses"],
            "skipped_steps": warm["skipped"] + timed["skipped"],
            "rates": {name.removeprefix("perf/"): value for name, value in figures.items()},
            "host_pct": timed["host_pct"],
            "seconds_by_part": by_part,
            "profile": kernels,
            "memory_gib": memory,
            "estimated_gib": self._estimated(case, batches) / GIB,
            "tokens_a_sample": batches.mean.tokens,
            "targets_a_sample": batches.mean.targets,
        }

    def run(self, batches: Batches, count: int) -> dict[str, Any]:
        """Run `count` steps as the training loop does; the host waits for the device before and after, not in between.

        Returns:
            Their time, losses, how many were left out (fp16), and what makes rates of them, given costs and peak.
        """
        engine = self._engine
        skipped = engine.skipped_steps
        wait(engine.device)
        began = time.perf_counter()
        for step in range(self._done, self._done + count):
            micro_batches = [batches.loaded[step % len(batches.loaded)]]
            self._run.progress.begin_step(step)
            self._checkpoints.on_batch(step, micro_batches)
            optimizer_step(self._run, step, micro_batches, self._accumulator, self._transfer)
            self._checkpoints.on_step(step)
        wait(engine.device)
        seconds = time.perf_counter() - began
        self._done += count
        forward, launching = engine.forward_clock.read_both()
        totals = self._accumulator.read(RankTimes(0.0, forward))
        return {
            "seconds": seconds,
            "losses": [loss for _, loss, _ in totals.steps],
            "skipped": engine.skipped_steps - skipped,
            "host_pct": 100 * launching / forward,
            "rates": lambda costs, peak: rates(totals, seconds, costs, peak),
        }

    def _costs(self, case: Case) -> Any:
        trained = [name for name, _ in self._engine.trained_parameters()]
        return step_flops(self._engine.module.config, trained, from_features=case.source == "features")

    def _peak(self) -> float | None:
        device = self._engine.device
        return peak_flops(torch.cuda.get_device_name(device), "bf16") if device.type == "cuda" else None

    def _memory(self) -> dict[str, float]:
        """Return peaks of this case in GiB; on a GPU those of tensors and of torch's allocator, and the card's use."""
        device = self._engine.device
        found = {"allocated": memory_gib(device)}
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            found |= {"reserved": torch.cuda.max_memory_reserved(device) / GIB, "in_use": (total - free) / GIB}
        return found

    def _estimated(self, case: Case, batches: Batches) -> float:
        """Return the bytes that `estimate` predicts for the same samples."""
        job = self._run.job
        batch = MicroBatchSize(case.batch, batches.mean, float(case.recompute), case.source == "features")
        config = self._engine.module.config
        shapes = parameter_shapes(config)
        quantized = quantized_weights(shapes, _bits(case), vision=False, fp8=_fp8(case))
        parts, ranks = trained_parts(job.recipe), job.ranks.world_size
        flat = self._engine.flat is not None
        memory = step_memory(config, parameter_counts(shapes), parts, batch, ranks, quantized, flat=flat)
        return memory[f"ZeRO-{case.zero}"].total


def _bits(case: Case) -> int | None:
    return 4 if case.lever == QUANTIZED else None


def _fp8(case: Case) -> str | None:
    return "all" if case.lever == FP8 else None


def main() -> None:
    """Measure case by case; each appends its results when it is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", required=True, help="the cases of one group, as JSON")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--steps", type=int, required=True, help="number of timed steps")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--save", action="store_true", help="save a checkpoint at the end")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cases = [Case(**each) for each in json.loads(args.cases)]
    job = make_job(cases[0], args.size, args.run_dir)
    began = time.perf_counter()
    join_ranks(job)
    device = torch.device("cuda", job.ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    case = cases[0]
    try:
        model = build(
            model_config(job.recipe, args.size), DTYPES[job.precision], device, _bits(case), fp8=case.lever == FP8
        )
        engine = Engine(model, job.deepspeed, job.recipe.optimizer, job.ranks)
        run = Run(job, engine, Progress(job.ranks.rank, job.recipe.train, set_group_timeout))
        if case.lever == COMPILED:  # the tiny model shows that it runs, without a compiler
            compile_blocks(model, **({"backend": "aot_eager"} if args.size == "tiny" else {}))
        if case.lever == GRAPHS:
            run.graphs = start_graphs(engine, GRAPH_TOKENS)
            if run.graphs is None:
                raise ConfigError("no CUDA graphs here; log.txt has the reason")
        print(f"model and engine: {time.perf_counter() - began:.1f} s", flush=True)
        with Checkpoints(run, {}) as checkpoints:
            bench = Bench(run, checkpoints, args.steps)
            for case in cases:
                figures = bench.measure(case)
                if job.ranks.is_main:
                    add(args.out, "steps", figures)
            if args.save:
                batches = make_batches(model.config, cases[0], job.ranks.rank, pinned=device.type == "cuda")
                times = save_times(run, lambda: bench.run(batches, 1))
                if job.ranks.is_main:
                    add(args.out, "save", {"group": cases[0].group, **times})
    except torch.OutOfMemoryError as error:
        reason = str(error).split("\n")[0]
        add(args.out, "steps", {"case": asdict(case), "status": OUT_OF_MEMORY, "why": reason})
        sys.exit(1)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
