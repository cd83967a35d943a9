"""The training loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.loader.dataset import MicroBatches, load_steps
from tinygptv_ds.data.loader.sample import Tokens, open_tokens
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.distributed import cores_per_rank
from tinygptv_ds.train.callbacks.benchmark_scores import BenchmarkScores
from tinygptv_ds.train.callbacks.callback import CallbackList
from tinygptv_ds.train.callbacks.first_samples import FirstSamples
from tinygptv_ds.train.callbacks.guard import Guard
from tinygptv_ds.train.callbacks.keep_best import KeepBest
from tinygptv_ds.train.callbacks.log import Log
from tinygptv_ds.train.callbacks.sample_panel import SamplePanel
from tinygptv_ds.train.callbacks.skipped_samples import SkippedSamples
from tinygptv_ds.train.callbacks.token_limit import TokenLimit
from tinygptv_ds.train.callbacks.validation_loss import ValidationLoss
from tinygptv_ds.train.liveness.progress import PREPARING, REPORTING
from tinygptv_ds.train.metrics.accumulator import Accumulator
from tinygptv_ds.train.metrics.reporter import Reporter
from tinygptv_ds.train.metrics.stopwatch import Stopwatch
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.step import optimizer_step
from tinygptv_ds.train.transfer import Transfer


def train(run: Run, stream: OpenStream) -> None:
    """Train from the run's first step to its last. Call on all ranks.

    Raises:
        DataError: more samples than the recipe allows could not be used.
        TinyGPTVError: a loss or gradient is not finite; it has moved no weight.
        Stopped: a signal came; the run is saved.
    """
    tokens = open_tokens(run.recipe, run.engine.module.config)
    accumulator, data_wait = Accumulator(run.engine, stream.names), Stopwatch(torch.device("cpu"))
    transfer = Transfer(run.engine.device)
    batches = load_batches(run, stream, tokens, data_wait)  # named, so that an error does not wait for its workers
    with Reporter(run) as reporter:
        callbacks = make_callbacks(run, stream, tokens, accumulator, reporter, data_wait)
        run.clock.restart()
        for step, micro_batches in batches:
            callbacks.on_batch(step, micro_batches)
            optimizer_step(run, step, micro_batches, accumulator, transfer)  # forward, backward, step
            run.progress.enter(REPORTING)
            callbacks.on_step(step)
        run.progress.last_phase("finishing")
        callbacks.on_end()


def load_batches(
    run: Run, stream: OpenStream, tokens: Tokens, data_wait: Stopwatch
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield each step, counted from 0, with this rank's micro-batches; the wait for them is timed."""
    recipe, ranks = run.recipe, run.ranks
    loader = load_steps(
        MicroBatches(stream, tokens, rank=ranks.rank, world_size=ranks.world_size),
        first=run.first_step,
        last=run.job.last_step,
        num_workers=min(recipe.data.num_workers, cores_per_rank(ranks)),
        pin_memory=run.engine.device.type == "cuda",
        read_seconds=recipe.data.read_timeout_seconds,
        on_hang=run.on_hang,
    )
    for step in itertools.count(run.first_step):
        if step >= run.last_step:  # it may have been brought forward by then
            return
        run.progress.begin_step(step)
        with data_wait.running():
            micro_batches = next(loader)
        run.progress.enter(PREPARING)
        yield step, micro_batches


def make_callbacks(
    run: Run,
    stream: OpenStream,
    tokens: Tokens,
    accumulator: Accumulator,
    reporter: Reporter,
    data_wait: Stopwatch,
) -> CallbackList:
    """Return everything that happens besides training, in its order within a step."""
    recipe = run.recipe
    callbacks = CallbackList()
    callbacks.extend(
        [
            FirstSamples(run, stream, tokens, reporter),
            SkippedSamples(recipe.data.max_skipped_share, run.job.last_step * recipe.train.batch_size),
            TokenLimit(recipe.train.max_tokens),
            Guard(run, stream, accumulator),
            Log(run, accumulator, reporter, data_wait, callbacks),
            ValidationLoss(run, tokens, reporter, callbacks),
            BenchmarkScores(run, tokens, reporter, callbacks),
            SamplePanel(run, stream, tokens, reporter, callbacks),
            KeepBest(run),
            *run.callbacks,
        ]
    )
    return callbacks
