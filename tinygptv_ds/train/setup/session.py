"""From a job to a run that can train: ranks, run directory, log, watchdog, engine, resume, and the end of it all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tinygptv_ds.console import GREEN
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.data.stream.sample_counts import local_sample_counts
from tinygptv_ds.distributed import broadcast_from_rank0, complete_env, cores_per_rank
from tinygptv_ds.dtypes import DTYPES
from tinygptv_ds.errors import Stopped
from tinygptv_ds.log import LOGGER, log_with_head, set_up_logging
from tinygptv_ds.models.attention import choose_backend, unusable_backends
from tinygptv_ds.models.fp8_linear import check_fp8_device
from tinygptv_ds.models.parameters import frozen_trainables
from tinygptv_ds.models.regions import CompileChoice, choose_compile, compile_blocks
from tinygptv_ds.models.tinygptv import TinyGPTVForConditionalGeneration
from tinygptv_ds.train.callbacks.checkpoints import Checkpoints
from tinygptv_ds.train.checkpoint import resume
from tinygptv_ds.train.checkpoint.fetch import fetch_newer_checkpoint
from tinygptv_ds.train.checkpoint.result import MODEL
from tinygptv_ds.train.checkpoint.run_fingerprint import run_fingerprint
from tinygptv_ds.train.cuda_graphs import start_graphs
from tinygptv_ds.train.engine import Engine, init_process_group
from tinygptv_ds.train.liveness.flight_recorder import enable_flight_recorder
from tinygptv_ds.train.liveness.group_timeout import set_group_timeout
from tinygptv_ds.train.liveness.progress import first_group_timeout
from tinygptv_ds.train.liveness.start_up import StartUp
from tinygptv_ds.train.liveness.watchdog import Watchdog
from tinygptv_ds.train.recipe_warnings import recipe_warnings
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.setup.closing_report import closing_report
from tinygptv_ds.train.setup.dry_run import finish_dry_run
from tinygptv_ds.train.setup.job import Job
from tinygptv_ds.train.setup.machine import computes_in_bf16
from tinygptv_ds.train.setup.run_dir import note_run, start_run_dir
from tinygptv_ds.train.setup.same_options import check_same_options


def join_ranks(job: Job) -> None:
    """Join the other ranks, open the run directory and its log, and seed torch. Call on all ranks.

    Raises:
        ConfigError: another job holds the run directory.
    """
    complete_env()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_per_rank(job.ranks))
    enable_flight_recorder(job.run_dir)
    device = init_process_group(job.ranks, first_group_timeout(job.recipe.train))
    check_same_options(job.ranks, job.settings())
    log_file = broadcast_from_rank0(job.ranks, lambda: str(start_run_dir(job)))
    set_up_logging(job.ranks.rank, Path(log_file))
    torch.manual_seed(job.recipe.seed)
    torch.distributed.barrier()
    LOGGER.info(
        "stage %d on %d rank(s) of %s, ZeRO-%d, %s, run directory %s",
        job.recipe.stage,
        job.ranks.world_size,
        device,
        job.zero_stage,
        job.precision,
        job.run_dir,
    )
    if device == "cpu" and job.precision == "bf16" and not computes_in_bf16():
        LOGGER.warning(
            "this CPU has no instructions for bf16 (avx512_bf16 or amx_bf16) and emulates it, which is slower than "
            "fp32; take --deepspeed-config ds_configs/cpu.json"
        )
    if job.recipe.model.fp8 is not None:
        check_fp8_device(torch.device(device))
    dtype, wanted = DTYPES[job.precision], job.recipe.model.attention
    chosen = choose_backend(wanted, device, dtype)  # before anything is loaded
    for name, reason in unusable_backends(device, dtype).items():
        LOGGER.warning("attention backend %s is installed but cannot be imported (%s): using %s", name, reason, chosen)
    compiling = compile_choice(job, device)
    if compiling.obstacle is not None:
        LOGGER.warning("model.compile is auto, and no block is compiled: %s", compiling.obstacle)


def compile_choice(job: Job, device: str) -> CompileChoice:
    """Return whether blocks are compiled; see `choose_compile`."""
    return choose_compile(job.recipe.model.compile, device, job.zero_stage, job.recipe.model.frozen_bits)


class Session:
    """Ranks that have joined, under a watchdog.

    Args:
        job: what they work on.
        watchdog: running.
        start_up: watches the launcher until this run can be saved.
    """

    def __init__(self, job: Job, watchdog: Watchdog, start_up: StartUp) -> None:
        self._job = job
        self._watchdog = watchdog
        self._start_up = start_up

    @contextmanager
    def start_engine(self, model: TinyGPTVForConditionalGeneration, stream: OpenStream) -> Iterator[Run]:
        """Wrap the model in DeepSpeed and restore the checkpoint that `job.resume` asks for. Enter on all ranks.

        Yields:
            The run, ready to train. When the block ends, checkpoints are complete and the ranks have parted.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another recipe, other data or other base weights.
        """
        job = self._job
        fingerprint = run_fingerprint(job.recipe, stream) if job.ranks.is_main else {}
        chosen = broadcast_from_rank0(job.ranks, lambda: _find_checkpoint(job, fingerprint))
        if job.ranks.is_main and not job.evaluate_only:
            note_run(job)
        checkpoint = None if chosen is None else resume.open_checkpoint(Path(chosen))
        if checkpoint is not None:
            resume.load_weights(model, checkpoint)
        model.frozen_updates |= frozen_trainables(model)
        keep_zero = job.recipe.train.deepspeed_checkpoints
        engine = Engine(model, job.deepspeed, job.recipe.optimizer, job.ranks, keep_zero=keep_zero)
        if engine.flat is not None:
            LOGGER.info("one rank leaves ZeRO-%d nothing to partition: AdamW moves flat tensors", engine.zero_stage)
        checkpointing = job.recipe.model.gradient_checkpointing
        LOGGER.info("attention: %s, gradient checkpointing: %s", engine.attention, checkpointing)
        if compile_choice(job, engine.device.type).on:
            compile_blocks(engine.module)
            LOGGER.info("the blocks of Phi, ViT and Q-Former are compiled at their first call")
        first_step = 0 if checkpoint is None else resume.restore_optimizer(engine, checkpoint)
        began_from = None if checkpoint is None else resume.began_from(job, checkpoint.folder)
        run = Run(job, engine, self._watchdog.progress, first_step, self._watchdog.stacks.dump_workers)
        run.graphs = start_graphs(engine, job.recipe.train.cuda_graph_tokens)
        if job.evaluate_only:
            run.ends_at = first_step
        try:
            with Checkpoints(run, fingerprint, began_from) as checkpoints:
                run.callbacks = [checkpoints]
                self._start_up.over()
                yield run
                if job.dry_run:
                    finish_dry_run(run)
        except Stopped:
            self._part()
            raise
        if job.ranks.is_main and (job.run_dir / MODEL).is_dir() and not job.evaluate_only:
            for line in closing_report(run):
                head, colon, text = ("", "", line) if line.startswith(" ") else line.partition(":")
                log_with_head(head + colon, text, GREEN)
        self._part()

    def _part(self) -> None:
        """Let the ranks end without one taking the end of another for a loss."""
        self._watchdog.leave()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _find_checkpoint(job: Job, fingerprint: dict[str, Any]) -> str | None:
    """Return the folder that the run resumes from, fetched from the mirror where that has a newer one."""
    fetch_newer_checkpoint(job, fingerprint)
    return resume.choose_checkpoint(job, fingerprint)


@contextmanager
def open_session(job: Job) -> Iterator[Session]:
    """Join the ranks, open the run directory and its log, and watch over what follows. Enter on all ranks."""
    with StartUp(job.launchers) as start_up:
        join_ranks(job)
        with Watchdog(job, set_group_timeout) as watchdog:
            if job.ranks.is_main:
                for warning in recipe_warnings(job.recipe, local_sample_counts(job.recipe)):
                    LOGGER.warning("%s", warning)
            yield Session(job, watchdog, start_up)
