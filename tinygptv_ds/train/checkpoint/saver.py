"""When a run is saved, the same on all ranks, and the writing in the background."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from tinygptv_ds.config.recipe import TrainSection
from tinygptv_ds.errors import CheckpointError, Stopped
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.checkpoint.storage import FOLDER, Snapshot, complete_ones, remove_old, write_checkpoint
from tinygptv_ds.train.engine import MOMENTS, Engine
from tinygptv_ds.train.liveness.stop_signals import SIGNALS, StopSignals, Votes

DEEPSPEED_FOLDER = "deepspeed"
_FAILURES_ALLOWED = 1  # in a row


class Saver:
    """Saves a run every N steps or minutes, at its end, and when a signal tells any rank to stop.

    To be entered on all ranks; leaving waits for what is still being written, whatever the reason.

    Args:
        engine: what is saved.
        facts: what a resumed run has to share (`facts_of`), plain values; wanted on rank 0 alone.
        began_from: the checkpoint of another run that this one began from.
    """

    def __init__(self, engine: Engine, facts: dict[str, Any], began_from: str | None = None) -> None:
        self._engine = engine
        self._facts = facts
        self._began_from = began_from
        self._train = engine.job.recipe.train
        self._saved = engine.first_step
        self._writer = Writer(engine.job.run_dir / FOLDER, self._train)
        self._signals = StopSignals()
        self._votes = Votes(engine, len(SIGNALS) + 2)
        self._last_time = time.monotonic()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # On its way out nothing may end it with another code, or before it has said why: signals come twice, and the
        # launcher sends its own as soon as one rank has gone.
        if error is None:
            self._signals.restore()
        self._writer.close()

    def before_step(self) -> None:
        """Tell the other ranks what this one has noticed. To be called on all ranks, with the step's batch at hand."""
        self._votes.cast([*self._signals.seen(), self._is_time(), self._writer.has_failed()])

    def after_step(self, done: int) -> None:
        """Save if it is time to, `done` steps having been made. To be called on all ranks.

        Raises:
            Stopped: a signal has come; the run is saved.
            CheckpointError: two checkpoints in a row could not be written.
        """
        *signals, is_time, has_failed = self._votes.count()
        if has_failed:
            raise CheckpointError(
                f"two checkpoints in a row could not be written ({self._writer.reason or 'rank 0 says why'}); the "
                "newest whole one is intact. Make room, then start the same command again to go on from it"
            )
        finished = done == self._train.total_steps
        every = self._train.checkpoint_every
        if finished or any(signals) or is_time or (every and done % every == 0):
            self._save(done)
        if any(signals) and not finished:
            number = next(each for each, came in zip(SIGNALS, signals, strict=True) if came)
            self._stop(number, done)

    def _is_time(self) -> bool:
        minutes = self._train.checkpoint_minutes
        is_main = self._engine.job.ranks.is_main
        return is_main and bool(minutes) and time.monotonic() - self._last_time >= 60 * minutes

    def _save(self, done: int) -> None:
        if done == self._saved:
            return
        began = time.perf_counter()
        with self._engine.progress.patience("saving"):
            self._writer.wait()
            snapshot = take_snapshot(self._engine, done, self._facts, self._began_from)
            if self._engine.job.ranks.is_main:
                LOGGER.info("step %d: saving; training waited %.2f s", done, time.perf_counter() - began)
                self._writer.write(snapshot)
            if self._train.deepspeed_checkpoints:
                save_deepspeed(self._engine, snapshot)
        self._saved, self._last_time = done, time.monotonic()

    def _stop(self, number: int, done: int) -> None:
        self._writer.wait()
        said = f"{SIGNALS[SIGNALS.index(number)].name} at step {done} of {self._train.total_steps}"
        if self._writer.reason is None:
            raise Stopped(number, f"{said}; saved. Start the same command again to go on")
        raise Stopped(number, f"{said}; NOT saved ({self._writer.reason}): it will go on from the checkpoint before")


class Writer:
    """Writes snapshots in a thread, one at a time.

    Attributes:
        reason: why the last one could not be written; None: it could.
    """

    def __init__(self, checkpoints: Path, train: TrainSection) -> None:
        self._checkpoints = checkpoints
        self._train = train
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures = 0
        self.reason: str | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write; the one before must be done."""
        self._pending = self._thread.submit(self._write, snapshot)

    def has_failed(self) -> bool:
        """Whether more than one in a row could not be written."""
        if self._pending is not None and self._pending.done():
            self.wait()
        return self._failures > _FAILURES_ALLOWED

    def wait(self) -> None:
        """Until nothing is being written; a failure is told, and what is whole stays as it was."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except OSError as error:
            self._failures += 1
            self.reason = str(error)
            LOGGER.warning("a checkpoint could not be written (%s); training goes on, the last one is intact", error)
        else:
            self._failures, self.reason = 0, None

    def close(self) -> None:
        """Wait, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        began = time.perf_counter()
        folder = write_checkpoint(self._checkpoints, snapshot)
        LOGGER.info("wrote %s in %.2f s in the background", folder, time.perf_counter() - began)
        remove_old(complete_ones(self._checkpoints), self._train.keep_checkpoints, self._train.keep_every)


def take_snapshot(engine: Engine, step: int, facts: dict[str, Any], began_from: str | None = None) -> Snapshot:
    """The state after `step` optimizer steps, its tensors on rank 0. To be called on all ranks."""
    tensors = {f"weight/{name}": weight for name, weight in engine.trained_state().items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}/{name}": value for name, value in engine.moments(moment).items()}
    state = {
        "step": step,
        "samples": step * engine.job.recipe.train.batch_size,
        "optimizer_steps": engine.optimizer_steps,
        "skipped_steps": engine.skipped_steps,
        "loss_scale": None if engine.scale is None else [engine.scale.value, engine.scale.good_steps],
        "world_size": engine.job.ranks.world_size,
        "zero_stage": engine.job.zero_stage,
        "began_from": began_from,
        "must_match": facts,
    }
    return Snapshot(tensors, state)


def save_deepspeed(engine: Engine, snapshot: Snapshot) -> None:
    """Let DeepSpeed write its own checkpoint, in place and in the open. To be called on all ranks."""
    folder = engine.job.run_dir / DEEPSPEED_FOLDER
    engine.save_deepspeed(folder, snapshot.name, dict(snapshot.state))
    if engine.job.ranks.is_main:
        train = engine.job.recipe.train
        remove_old(complete_ones(folder), train.keep_checkpoints, train.keep_every)
