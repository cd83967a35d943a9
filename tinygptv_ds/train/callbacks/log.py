"""The log line: what all ranks did since the last one, on the console, TensorBoard, `metrics.jsonl` and trackers."""

from __future__ import annotations

from tinygptv_ds.train.callbacks.callback import Callback, LogRecord
from tinygptv_ds.train.metrics.accumulator import Accumulator, RankTimes
from tinygptv_ds.train.metrics.reporter import Reporter
from tinygptv_ds.train.metrics.stopwatch import Stopwatch
from tinygptv_ds.train.run import Run
from tinygptv_ds.train.schedule import learning_rate_of_step


class Log(Callback):
    """Sums what was accumulated over all ranks, lets the other callbacks add to it, and reports it.

    Settings: `train.log_every`, `train.trackers`. Metrics: `train/loss`, `train/loss_DATASET`, `train/lr`,
    `train/grad_norm`, `train/loss_scale`, `train/skipped_steps`, `data/skipped`, `data/skipped_REASON`,
    `data/mix_DATASET`, `data/with_image_DATASET`, `data/text_only_DATASET`, `perf/host_pct` (the host's time for this
    rank's forward passes, in per cent of the device's), and `perf/`: see `rates` and `memory_gib` of
    `train/metrics/reporter.py`.

    Args:
        run: the run on this rank.
        accumulator: losses and counts since the last line.
        reporter: writes the line.
        data_wait: the time this rank has waited for data.
        callbacks: add their metrics and remarks to each line.
    """

    def __init__(
        self, run: Run, accumulator: Accumulator, reporter: Reporter, data_wait: Stopwatch, callbacks: Callback
    ) -> None:
        self._run = run
        self._accumulator = accumulator
        self._reporter = reporter
        self._data_wait = data_wait
        self._callbacks = callbacks

    def on_step(self, step: int) -> None:
        """Move the progress bar, and write a line where one is due."""
        self._reporter.step_done()
        done, engine = step + 1, self._run.engine
        if self._reporter.is_due(done):
            forward, launching = engine.forward_clock.read_both()
            totals = self._accumulator.read(RankTimes(self._data_wait.read(), forward))
            metrics = {
                "train/lr": learning_rate_of_step(step, self._run.recipe),
                "train/grad_norm": engine.grad_norm(),
                "train/loss_scale": engine.loss_scale(),
                "train/skipped_steps": engine.skipped_steps,
                "perf/host_pct": 100 * launching / forward if forward else 0.0,
            }
            record = LogRecord(done, totals, metrics)
            self._callbacks.on_log(record)
            self._reporter.log(record)
