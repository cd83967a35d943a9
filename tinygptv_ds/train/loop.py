"""The training loop: one optimizer step after the other, from the stream's step to the logged figures."""

from __future__ import annotations

import hashlib
from collections import Counter

import torch

from tinygptv_ds.config.recipe import OptimizerSection
from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.data.loader.dataset import MicroBatches, load_steps
from tinygptv_ds.data.loader.sample import Tokens
from tinygptv_ds.data.stream.plan import OpenStream
from tinygptv_ds.distributed import cores_per_rank
from tinygptv_ds.errors import DataError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.benchmark_scores import Evaluation
from tinygptv_ds.train.callbacks.first_samples import show_first_samples
from tinygptv_ds.train.callbacks.guard import Guard
from tinygptv_ds.train.callbacks.sample_panel import Panel
from tinygptv_ds.train.callbacks.validation_loss import Validation
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.liveness.progress import PREPARING, REPORTING
from tinygptv_ds.train.metrics.accumulator import RankTimes, Sums, Totals
from tinygptv_ds.train.metrics.reporter import Reporter
from tinygptv_ds.train.metrics.stopwatch import Stopwatch
from tinygptv_ds.train.schedule import begins_cycle, rate_of_step
from tinygptv_ds.train.transfer import Transfer, model_inputs

_JUDGED_AFTER = 1000  # samples; before, the allowed share of skipped ones is that of this many


def train(engine: Engine, stream: OpenStream, tokens: Tokens) -> None:
    """Run the recipe's steps from where the engine stands. To be called on all ranks.

    Raises:
        DataError: more samples than the recipe allows could not be used.
        TinyGPTVError: a loss or gradient is not finite; no weight has been moved by it.
        Stopped: a signal came; the run is saved.
    """
    recipe, ranks = engine.job.recipe, engine.job.ranks
    warn_of_rising_rate(recipe.optimizer)
    total = engine.job.last_step
    loader = load_steps(
        MicroBatches(stream, tokens, rank=ranks.rank, world_size=ranks.world_size),
        first=engine.first_step,
        last=total,
        num_workers=min(recipe.data.num_workers, cores_per_rank(ranks)),
        pin_memory=engine.device.type == "cuda",
        read_seconds=recipe.data.read_timeout_seconds,
        on_hang=engine.on_hang,
    )
    validation, panel = Validation(engine, tokens), Panel(engine, stream, tokens)
    evaluation = Evaluation(engine, tokens)
    reporter = Reporter(engine, total, engine.first_step)
    if engine.first_step == 0 and reporter.board is not None:
        show_first_samples(stream, tokens, reporter.board)
    sums, transfer = Sums(engine, stream.names), Transfer(engine.device)
    guard, waiting = Guard(engine, stream), Stopwatch(torch.device("cpu"))
    skips = SkipCounter(recipe.data.max_skipped_share, total * recipe.train.batch_size)
    over = OverLimit(recipe.train.max_tokens)
    for step in range(engine.first_step, total):
        engine.progress.begin_step(step)
        with waiting.running():
            loaded = next(loader)
        engine.progress.enter(PREPARING)
        skips.report(loaded)
        over.look(loaded)
        guard.look(step, loaded)
        engine.saver.before_step()
        optimizer_step(engine, step, loaded, sums, transfer)
        guard.stop_if_left_out(step, sums.recent)
        engine.progress.enter(REPORTING)
        reporter.step_done()
        done = step + 1
        if reporter.is_due(done):
            totals = sums.read(RankTimes(waiting.read(), engine.forward_clock.read()))
            skips.judge(totals)
            over.report()
            reporter.log(done, totals, _figures(engine, step) | {"spike": guard.judge(totals)}, skips.summary())
        if _now_and_then(recipe.train.validate_every, done) and done != total:
            with reporter.aside(), engine.progress.patience("validating"):
                reporter.scalars(done, validation.measure(done))
        if _now_and_then(recipe.evaluation.every, done) and done != total:
            with reporter.aside(), engine.progress.patience("evaluating"):
                reporter.scalars(done, evaluation.measure(done))
        if _now_and_then(recipe.train.sample_every, done) and done != total:
            with reporter.aside(), engine.progress.patience("answering the panel"):
                panel.write(reporter.board, done)
        with reporter.aside():
            engine.saver.after_step(done)
    engine.progress.last_phase("finishing")
    reporter.scalars(total, validation.measure(total))
    reporter.scalars(total, evaluation.measure(total))
    panel.write(reporter.board, total)
    reporter.close()


def _now_and_then(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def warn_of_rising_rate(optimizer: OptimizerSection) -> None:
    """The published stage 4 does it, most likely by mistake; MiniGPT-v2's own recipe falls to 1e-6."""
    if optimizer.min_lr > optimizer.lr:
        LOGGER.warning(
            "the learning rate rises from %g towards %g: optimizer.min_lr lies above optimizer.lr, as in the published "
            "stage 4; --set optimizer.min_lr=1e-6 lets it fall",
            optimizer.lr,
            optimizer.min_lr,
        )


def optimizer_step(engine: Engine, step: int, loaded: list[MicroBatch], sums: Sums, transfer: Transfer) -> None:
    """One step of this rank's micro-batches, counted in `sums`. To be called on all ranks.

    The host waits for the device once, where ZeRO asks whether a gradient is not finite.
    """
    recipe = engine.job.recipe
    batches = [transfer(item.batch) for item in loaded]
    divisor = None
    if recipe.train.loss_reduction == "step_mean":
        targets = sum(len(batch.targets) for batch in batches)
        # Filled in on the device: torch.tensor would wait for what is queued there.
        divisor = engine.all_reduce(torch.full((), float(targets), device=engine.device)).clamp(min=1)
    if begins_cycle(step, recipe):
        engine.reset_optimizer()
    engine.set_learning_rate(rate_of_step(step, recipe))
    # Dropout is a function of step and rank, so a resumed run draws what an unbroken one would have drawn.
    torch.manual_seed(_seed(recipe.seed, step, engine.job.ranks.rank))
    for number, (item, batch) in enumerate(zip(loaded, batches, strict=True)):
        output = engine.micro_step(model_inputs(batch), divisor, number=number, count=len(batches))
        sums.add(step, item, batch, output.token_losses)


def _figures(engine: Engine, step: int) -> dict[str, float]:
    return {
        "lr": rate_of_step(step, engine.job.recipe),
        "grad_norm": engine.grad_norm(),
        "loss_scale": engine.loss_scale(),
        "skipped_steps": engine.skipped_steps,
    }


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class OverLimit:
    """Tells where micro-batches came out above `train.max_tokens`: a step is packed by estimated lengths."""

    def __init__(self, max_tokens: int | None) -> None:
        self._max_tokens = max_tokens
        self._longest, self._count = 0, 0

    def look(self, loaded: list[MicroBatch]) -> None:
        """Note this rank's micro-batches of a step."""
        if self._max_tokens is not None:
            lengths = [len(item.batch.input_ids) for item in loaded]
            self._count += sum(length > self._max_tokens for length in lengths)
            self._longest = max(self._longest, *lengths)

    def report(self) -> None:
        """Warn of those since the last call."""
        if self._count:
            LOGGER.warning(
                "%d micro-batches of this rank had more than train.max_tokens (%d) tokens, %d at most: texts here take "
                "more tokens than estimated; lower train.max_tokens where memory is short",
                self._count,
                self._max_tokens,
                self._longest,
            )
        self._count = 0


class SkipCounter:
    """Names samples that dropped out, and stops the run when they are too many."""

    def __init__(self, max_share: float, samples_of_run: int) -> None:
        self._max_share = max_share
        self._least = min(_JUDGED_AFTER, samples_of_run)
        self._seen = 0.0
        self._skipped = 0
        self._reasons: Counter[str] = Counter()
        self._recent: list[str] = []

    def report(self, loaded: list[MicroBatch]) -> None:
        """Log this rank's dropped samples with shard and key."""
        for item in loaded:
            for skipped in item.skipped:
                LOGGER.warning("skipped (%s) %s", skipped.reason, skipped.message)
                self._recent = [*self._recent[-9:], skipped.message]

    def judge(self, totals: Totals) -> None:
        """Count what all ranks saw since the last call.

        Raises:
            DataError: more than the allowed share dropped out.
        """
        for reason, count in totals.skipped.items():
            self._reasons[reason] += count
        self._skipped = sum(self._reasons.values())
        self._seen += sum(totals.skipped.values()) + sum(totals.samples.values())
        allowed = self._max_share * max(self._seen, self._least)
        if self._skipped > allowed:
            listed = "\n".join(f"  - {message}" for message in self._recent) or "  - (on other ranks; see above)"
            raise DataError(
                f"{self._skipped} of {self._seen:.0f} samples could not be used ({self.summary()}), more than "
                f"data.max_skipped_share ({self._max_share}) allows. Mend the data or raise the share. "
                f"The last ones:\n{listed}"
            )

    def summary(self) -> str:
        """How many dropped out so far, by reason."""
        return ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
