"""The training loop: one optimizer step after the other, from the stream's step to the logged figures."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter

import torch

from tinygptv_ds.config.schema import OptimizerSection
from tinygptv_ds.data.batch import Batch
from tinygptv_ds.data.loader import Loaded, MicroBatches, Tokens, load_steps
from tinygptv_ds.data.stream import OpenStream
from tinygptv_ds.dist import cores_per_rank
from tinygptv_ds.errors import DataError, TinyGPTVError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.engine import Engine
from tinygptv_ds.train.metrics import Reporter, Sums
from tinygptv_ds.train.panel import Panel
from tinygptv_ds.train.schedule import learning_rate
from tinygptv_ds.train.transfer import Transfer

_JUDGED_AFTER = 1000  # samples; before, the allowed share of skipped ones is that of this many


def train(engine: Engine, stream: OpenStream, tokens: Tokens) -> None:
    """Run the recipe's steps from where the engine stands. To be called on all ranks.

    Raises:
        DataError: more samples than the recipe allows could not be used.
        TinyGPTVError: the loss is no longer finite.
        Stopped: a signal came; the run is saved.
    """
    recipe, ranks = engine.job.recipe, engine.job.ranks
    warn_of_rising_rate(recipe.optimizer)
    total = recipe.train.total_steps
    loader = load_steps(
        MicroBatches(stream, tokens, rank=ranks.rank, world_size=ranks.world_size),
        first=engine.first_step,
        last=total,
        num_workers=min(recipe.data.num_workers, cores_per_rank(ranks)),
        pin_memory=engine.device.type == "cuda",
    )
    reporter = Reporter(engine, total, engine.first_step)
    sums, transfer = Sums(engine, stream.names), Transfer(engine.device)
    panel = Panel(engine, stream, tokens)
    skips = SkipCounter(recipe.data.max_skipped_share, total * recipe.train.batch_size)
    over = OverLimit(recipe.train.max_tokens)
    waited, last_log = 0.0, engine.first_step
    for step in range(engine.first_step, total):
        start = time.perf_counter()
        loaded = next(loader)
        waited += time.perf_counter() - start
        skips.report(loaded)
        over.look(loaded)
        engine.saver.before_step()
        _optimizer_step(engine, step, loaded, sums, transfer)
        reporter.step_done()
        done = step + 1
        if done == engine.first_step + 1 or done % recipe.train.log_every == 0 or done == total:
            totals = sums.read()
            _stop_if_not_finite(totals["loss"], done)
            skips.judge(totals)
            over.report()
            reporter.log(done, totals, _figures(engine, step), waited, done - last_log, skips.summary())
            waited, last_log = 0.0, done
        if recipe.train.sample_every and done % recipe.train.sample_every == 0 and done != total:
            panel.write(reporter.board, done)
        engine.saver.after_step(done)
    panel.write(reporter.board, total)
    reporter.close()


def warn_of_rising_rate(optimizer: OptimizerSection) -> None:
    """The published stage 4 does it, most likely by mistake; MiniGPT-v2's own recipe falls to 1e-6."""
    if optimizer.min_lr > optimizer.lr:
        LOGGER.warning(
            "the learning rate rises from %g towards %g: optimizer.min_lr lies above optimizer.lr, as in the published "
            "stage 4; --set optimizer.min_lr=1e-6 lets it fall",
            optimizer.lr,
            optimizer.min_lr,
        )


def _optimizer_step(engine: Engine, step: int, loaded: list[Loaded], sums: Sums, transfer: Transfer) -> None:
    recipe = engine.job.recipe
    batches = [transfer(item.batch) for item in loaded]
    divisor = None
    if recipe.train.loss_reduction == "step_mean":
        targets = sum(len(batch.targets) for batch in batches)
        divisor = engine.all_reduce(torch.tensor(float(targets), device=engine.device)).clamp(min=1)
    engine.set_learning_rate(_rate(engine, step))
    # Dropout is a function of step and rank, so a resumed run draws what an unbroken one would have drawn.
    torch.manual_seed(_seed(recipe.seed, step, engine.job.ranks.rank))
    for number, (item, batch) in enumerate(zip(loaded, batches, strict=True)):
        output = engine.micro_step(model_inputs(batch), divisor, number=number, count=len(batches))
        sums.add(batch, output.token_losses, [skipped.reason for skipped in item.skipped])


def model_inputs(batch: Batch) -> dict:
    """The keyword arguments of the model's packed forward."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "pixel_values": batch.pixel_values,
        "image_features": batch.image_features,
        "image_rows": batch.image_rows,
        "image_index": batch.image_index,
        "target_rows": batch.target_rows,
        "targets": batch.targets,
    }


def _rate(engine: Engine, step: int) -> float:
    recipe = engine.job.recipe
    return learning_rate(
        step, recipe.optimizer, steps_per_epoch=recipe.train.steps_per_epoch, total_steps=recipe.train.total_steps
    )


def _figures(engine: Engine, step: int) -> dict[str, float]:
    return {
        "lr": _rate(engine, step),
        "grad_norm": engine.grad_norm(),
        "loss_scale": engine.loss_scale(),
        "skipped_steps": engine.skipped_steps,
    }


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _stop_if_not_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TinyGPTVError(
            f"the loss is {loss} at step {step}; nothing was saved from it. Lower optimizer.lr, lengthen "
            "optimizer.warmup_steps, or look at the samples of the last steps"
        )


class OverLimit:
    """Tells where micro-batches came out above `train.max_tokens`: a step is packed by estimated lengths."""

    def __init__(self, max_tokens: int | None) -> None:
        self._max_tokens = max_tokens
        self._longest, self._count = 0, 0

    def look(self, loaded: list[Loaded]) -> None:
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

    def report(self, loaded: list[Loaded]) -> None:
        """Log this rank's dropped samples with shard and key."""
        for item in loaded:
            for skipped in item.skipped:
                LOGGER.warning("skipped (%s) %s", skipped.reason, skipped.message)
                self._recent = [*self._recent[-9:], skipped.message]

    def judge(self, totals: dict) -> None:
        """Count what all ranks saw since the last call.

        Raises:
            DataError: more than the allowed share dropped out.
        """
        for reason, count in totals["skipped"].items():
            self._reasons[reason] += count
        self._skipped = sum(self._reasons.values())
        self._seen += sum(totals["skipped"].values()) + totals["samples"]
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
