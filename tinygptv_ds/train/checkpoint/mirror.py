"""The mirror of a run in object storage: its checkpoints and `model/`, copied while training continues."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tinygptv_ds.config.train_section import TrainSection
from tinygptv_ds.log import LOGGER
from tinygptv_ds.object_storage import RemoteFolders
from tinygptv_ds.train.checkpoint.folders import FOLDER, is_complete, step_of


class Mirror:
    """Copies folders of a run directory to `train.mirror` in a thread of its own, one at a time.

    It never holds up training and never ends it: what cannot be copied is a warning. A checkpoint that is still waiting
    when a newer one comes is passed over, unless `train.keep_every` keeps it.

    Args:
        url: the mirror's.
        run_dir: the run directory, below which all folders are.
        train: how many checkpoints are kept.
        first_step: where the run resumes. Newer checkpoints there are of a course that it has left, and are removed.

    Attributes:
        newest: the step of the newest checkpoint that is there; -1: none is known.
        failures: how many folders could not be copied.
    """

    def __init__(self, url: str, run_dir: Path, train: TrainSection, first_step: int = 0) -> None:
        self._remote, self._run_dir, self._train = RemoteFolders(url), run_dir, train
        self._first_step = first_step
        self._waiting: list[Path] = []
        self._at: Path | None = run_dir  # what the thread is at: at first a look at what is there
        self._closing = False
        self._changed = threading.Condition()
        self.newest, self.failures = -1, 0
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def add(self, folder: Path) -> None:
        """Have a complete folder of the run directory copied; returns at once."""
        with self._changed:
            if is_complete(folder):
                self._waiting = [each for each in self._waiting if self._is_kept(each) or each.parent != folder.parent]
            self._waiting.append(folder)
            self._changed.notify_all()

    def holds(self, folder: Path) -> bool:
        """Return whether a folder is being copied or waits for it, and has to stay."""
        with self._changed:
            return folder == self._at or folder in self._waiting

    def finish(self, seconds: float) -> bool:
        """Wait for what is to be copied, at most so long; return whether all of it is there."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if self._at is not None or self._waiting:
                LOGGER.info("copying to %s; waiting up to %.0f s for it", self._remote, seconds)
            done = self._changed.wait_for(lambda: self._at is None and not self._waiting, seconds)
            left = [folder.name for folder in (self._at, *self._waiting) if folder is not None]
        if not done:
            LOGGER.warning(
                "%s of %s did not get to %s in %.0f s; the next start of this run copies its newest checkpoint",
                *(" and ".join(left), self._run_dir, self._remote, seconds),
            )
        return done and not self.failures

    def _is_kept(self, folder: Path) -> bool:
        every = self._train.keep_every
        return not is_complete(folder) or bool(every and step_of(folder) % every == 0)

    def _run(self) -> None:
        try:
            self._forget_later_steps()
        except Exception as error:  # nothing that happens here may end a run
            LOGGER.warning("%s cannot be read (%s); training continues", self._remote, error)
        self._done()
        while (folder := self._next()) is not None:
            try:
                self._copy(folder)
            except Exception as error:
                self._report(folder, error)
            self._done()

    def _done(self) -> None:
        with self._changed:
            self._at = None
            self._changed.notify_all()

    def _forget_later_steps(self) -> None:
        for name in self._remote.names(FOLDER):
            if is_complete(Path(name)) and step_of(Path(name)) > self._first_step:
                LOGGER.warning("%s/%s is newer than the step that this run resumes at, and removed", self._remote, name)
                self._remote.remove(f"{FOLDER}/{name}")
            elif is_complete(Path(name)):
                self.newest = step_of(Path(name))

    def _next(self) -> Path | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting)
            self._at = self._waiting.pop(0) if self._waiting else None
            return self._at

    def _copy(self, folder: Path) -> None:
        began, name = time.perf_counter(), folder.relative_to(self._run_dir).as_posix()
        self._remote.put(folder, name)
        LOGGER.info("copied %s to %s in %.1f s in the background", name, self._remote, time.perf_counter() - began)
        if is_complete(folder):
            if folder.parent.name == FOLDER:
                self.newest = step_of(folder)
            self._prune(folder)

    def _prune(self, newest: Path) -> None:
        """Remove what is too old, and what an earlier upload left incomplete, next to the checkpoint just copied."""
        parent = newest.parent.relative_to(self._run_dir).as_posix()
        there = [Path(name) for name in self._remote.names(parent) if is_complete(Path(name))]
        old = [each for each in there[: -self._train.keep_checkpoints] if not self._is_kept(each)]
        for each in (*old, *self._remote.names(parent, complete=False)):
            self._remote.remove(f"{parent}/{each}")

    def _report(self, folder: Path, error: Exception) -> None:
        if not folder.is_dir():
            LOGGER.info("%s was removed before it was copied to %s", folder, self._remote)
            return
        self.failures += 1
        known = f"; the newest checkpoint there is that of step {self.newest}" if self.newest >= 0 else ""
        LOGGER.warning("%s could not be copied (%s); training continues%s", folder.name, error, known)
