"""Writing checkpoints in the background."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.checkpoint.folders import complete_ones
from tinygptv_ds.train.checkpoint.mirror import Mirror
from tinygptv_ds.train.checkpoint.storage import Snapshot, remove_old, write_checkpoint

_FAILURES_ALLOWED = 1  # in a row


class CheckpointWriter:
    """Writes snapshots in a thread, one at a time.

    Args:
        checkpoints: the folder that gets a folder for each snapshot.
        train: how many checkpoints are kept.
        mirror: gets each of them, too; None: there is none.

    Attributes:
        reason: why the last one could not be written; None: it could.
    """

    def __init__(self, checkpoints: Path, train: TrainSection, mirror: Mirror | None = None) -> None:
        self._checkpoints = checkpoints
        self._train, self._mirror = train, mirror
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures = 0
        self.reason: str | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Start to write; the one before must be finished."""
        self._pending = self._thread.submit(self._write, snapshot)

    def has_failed(self) -> bool:
        """Return whether more than one in a row could not be written."""
        if self._pending is not None and self._pending.done():
            self.wait()
        return self._failures > _FAILURES_ALLOWED

    def wait(self) -> None:
        """Wait until nothing is being written; a failure is logged, and complete checkpoints stay as they are."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except OSError as error:
            self._failures += 1
            self.reason = str(error)
            LOGGER.warning("a checkpoint could not be written (%s); training continues, the last one is intact", error)
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
        if self._mirror is not None:
            self._mirror.add(folder)
        remove_old(complete_ones(self._checkpoints), self._train, self._mirror.holds if self._mirror else None)
