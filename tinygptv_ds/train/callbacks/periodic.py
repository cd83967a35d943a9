"""What is measured every N steps and at the end: the base of validation loss, benchmark scores and sample panel."""

from __future__ import annotations

from tinygptv_ds.train.callbacks.callback import Callback
from tinygptv_ds.train.metrics.reporter import Reporter
from tinygptv_ds.train.run import Run


class Periodic(Callback):
    """Measures every N steps and after the last one, outside the clock and the time limits of training.

    Args:
        run: the run on this rank.
        reporter: writes the scalars.
        callbacks: get what was measured.
        every: steps between measurements; 0: only at the end.
        phase: what the watchdog reports as the rank's work during the call.
    """

    def __init__(self, run: Run, reporter: Reporter, callbacks: Callback, *, every: int, phase: str) -> None:
        self._run = run
        self._reporter = reporter
        self._callbacks = callbacks
        self._every = every
        self._phase = phase

    def measure(self, done: int) -> dict[str, float]:
        """Return metrics by name after `done` steps. Called on all ranks."""
        raise NotImplementedError

    def on_step(self, step: int) -> None:
        """Measure where it is due; after the last step `on_end` does."""
        done = step + 1
        if self._every and done % self._every == 0 and done != self._run.last_step:
            with self._run.clock.pause(), self._run.progress.patience(self._phase):
                self._measure(done)

    def on_end(self) -> None:
        """Measure the final model."""
        self._measure(self._run.last_step)

    def _measure(self, done: int) -> None:
        metrics = self.measure(done)
        self._reporter.scalars(done, metrics)
        self._callbacks.on_measure(done, metrics)
