"""When a run is saved, the same on all ranks, and when a signal ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.errors import CheckpointError, Stopped
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.callback import Callback, LogRecord
from tinygptv_ds.train.checkpoint.deepspeed_format import write_deepspeed_checkpoint
from tinygptv_ds.train.checkpoint.folders import FOLDER, complete_ones
from tinygptv_ds.train.checkpoint.mirror import Mirror
from tinygptv_ds.train.checkpoint.result import MODEL
from tinygptv_ds.train.checkpoint.snapshot import take_snapshot
from tinygptv_ds.train.checkpoint.storage import Snapshot, remove_old
from tinygptv_ds.train.checkpoint.writer import CheckpointWriter
from tinygptv_ds.train.liveness.stop_signals import SIGNALS, StopSignals, Votes
from tinygptv_ds.train.run import Run

DEEPSPEED_FOLDER = "deepspeed"
_MIRROR_AT_END, _MIRROR_AT_STOP = 600.0, 60.0  # seconds to wait for it; schedulers kill a minute or so after a SIGTERM


def _open_mirror(run: Run) -> Mirror | None:
    """Return the mirror of a run on rank 0, where the recipe names one; it gets the checkpoint that is resumed from."""
    url = run.recipe.train.mirror
    if url is None or not run.ranks.is_main or run.job.dry_run or run.job.evaluate_only:
        return None
    mirror = Mirror(url, run.job.run_dir, run.recipe.train, run.first_step)
    resumed = run.job.run_dir / FOLDER / f"step-{run.first_step:08d}"
    if resumed.is_dir():
        mirror.add(resumed)
    return mirror


class Checkpoints(Callback):
    """Saves the run every N steps or minutes, at its end, and when a signal asks any rank to stop.

    Settings: `train.checkpoint_every`, `train.checkpoint_minutes`, `train.keep_checkpoints`, `train.keep_every`,
    `train.deepspeed_checkpoints`, `train.mirror`. Metrics: with a mirror `mirror/step`, the newest step that is there,
    and `mirror/failures`.

    A context manager that all ranks enter; leaving it waits for what is still being written, whatever the reason.

    Args:
        run: the run on this rank.
        fingerprint: what a resumed run must share (`run_fingerprint`); needed on rank 0 only.
        began_from: the checkpoint of another run that this one began from.
    """

    def __init__(self, run: Run, fingerprint: dict[str, Any], began_from: str | None = None) -> None:
        self._run = run
        self._fingerprint = fingerprint
        self._began_from = began_from
        self._train = run.recipe.train
        self._saved = run.first_step
        self._mirror = _open_mirror(run)
        self._writer = CheckpointWriter(run.job.run_dir / FOLDER, self._train, self._mirror)
        self._signals = StopSignals(run.job.launchers)
        self._votes = Votes(run.engine, len(SIGNALS) + 2)
        self._last_time = time.monotonic()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error nothing may end the process with another code, or before it has reported why: signals come
        # twice, and the launcher sends its own as soon as one rank has gone.
        if error is None:
            self._signals.restore()
        self._writer.close()
        if self._mirror is not None:
            self._finish_mirror(self._mirror, error)

    def on_batch(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Share with the other ranks what this one has noticed: the sum is ready once the step is computed."""
        self._votes.cast([*self._signals.seen(), self._is_time(), self._writer.has_failed()])

    def on_step(self, step: int) -> None:
        """Save where it is due, and stop where a signal came.

        Raises:
            Stopped: a signal has come; the run is saved.
            CheckpointError: two checkpoints in a row could not be written.
        """
        with self._run.clock.pause():
            self._save_or_stop(step + 1)

    def on_log(self, record: LogRecord) -> None:
        """Add how far the mirror is."""
        if self._mirror is not None:
            record.metrics |= {"mirror/step": self._mirror.newest, "mirror/failures": self._mirror.failures}

    def _finish_mirror(self, mirror: Mirror, error: BaseException | None) -> None:
        """Copy what is left: at the end of a run `model/`, too; when it is stopped, as far as the time allows."""
        if error is None:
            model = self._run.job.run_dir / MODEL
            if model.is_dir():
                mirror.add(model)
            mirror.finish(_MIRROR_AT_END)
        elif isinstance(error, Stopped):
            mirror.finish(_MIRROR_AT_STOP)

    def _save_or_stop(self, done: int) -> None:
        *signals, is_time, has_failed = self._votes.count()
        if has_failed:
            raise CheckpointError(
                f"two checkpoints in a row could not be written ({self._writer.reason or 'see the log of rank 0'}); "
                "the newest complete one is intact. Make room, then start the same command again to resume from it"
            )
        finished = done == self._run.last_step and not self._run.job.dry_run
        every = self._train.checkpoint_every
        if finished or any(signals) or is_time or (every and done % every == 0):
            self._save(done)
        if any(signals) and not finished:
            number = next(each for each, came in zip(SIGNALS, signals, strict=True) if came)
            self._stop(number, done)

    def _is_time(self) -> bool:
        minutes = self._train.checkpoint_minutes
        return self._run.ranks.is_main and bool(minutes) and time.monotonic() - self._last_time >= 60 * minutes

    def _save(self, done: int) -> None:
        if done == self._saved:
            return
        began = time.perf_counter()
        with self._run.progress.patience("saving"):
            self._writer.wait()
            snapshot = take_snapshot(
                self._run.engine,
                done,
                batch_size=self._train.batch_size,
                fingerprint=self._fingerprint,
                began_from=self._began_from,
            )
            if self._run.ranks.is_main:
                LOGGER.info("step %d: saving; training waited %.2f s", done, time.perf_counter() - began)
                self._writer.write(snapshot)
            if self._train.deepspeed_checkpoints:
                self._save_deepspeed(snapshot)
        self._saved, self._last_time = done, time.monotonic()

    def _save_deepspeed(self, snapshot: Snapshot) -> None:
        """Let DeepSpeed write its own checkpoint while training waits. Call on all ranks."""
        folder: Path = self._run.job.run_dir / DEEPSPEED_FOLDER
        problem = write_deepspeed_checkpoint(self._run.engine, folder, snapshot.name, dict(snapshot.state))
        if problem is not None:
            LOGGER.warning(
                "DeepSpeed's own checkpoint %s could not be written (%s); training continues", snapshot.name, problem
            )
        elif self._run.ranks.is_main:
            if self._mirror is not None:
                self._mirror.add(folder / snapshot.name)
            remove_old(complete_ones(folder), self._train, self._mirror.holds if self._mirror else None)

    def _stop(self, number: int, done: int) -> None:
        self._writer.wait()
        signal = f"{SIGNALS[SIGNALS.index(number)].name} at step {done} of {self._train.total_steps}"
        if self._writer.reason is None:
            raise Stopped(number, f"{signal}; saved. Start the same command again to resume")
        raise Stopped(
            number, f"{signal}; NOT saved ({self._writer.reason}): the run will resume from the checkpoint before"
        )
