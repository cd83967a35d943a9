"""Samples that could not be used: named, counted, and a reason to stop where they are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.errors import DataError
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.callback import Callback, LogRecord
from tinygptv_ds.train.metrics.accumulator import Totals

_JUDGED_AFTER = 1000  # samples; before, the allowed share of skipped ones is that of this many


class SkippedSamples(Callback):
    """Names samples that dropped out, and stops the run when they are too many.

    Settings: `data.max_skipped_share`. Metrics: none of its own (`data/skipped` and `data/skipped_REASON` are part of
    every log line); a remark with the counts so far.

    Args:
        max_share: share of the samples seen that may be skipped.
        samples_of_run: a run shorter than 1000 samples is judged against its whole length from the start.
    """

    def __init__(self, max_share: float, samples_of_run: int) -> None:
        self._max_share = max_share
        self._least = min(_JUDGED_AFTER, samples_of_run)
        self._seen = 0.0
        self._skipped = 0
        self._reasons: Counter[str] = Counter()
        self._recent: list[str] = []

    def on_batch(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Log this rank's skipped samples with shard and key."""
        for micro_batch in micro_batches:
            for skipped in micro_batch.skipped:
                LOGGER.warning("skipped (%s) %s", skipped.reason, skipped.message)
                self._recent = [*self._recent[-9:], skipped.message]

    def on_log(self, record: LogRecord) -> None:
        """Judge what all ranks saw since the last line, and add the counts so far to the line."""
        self.judge(record.totals)
        if self._reasons:
            record.remarks.append(f"skipped so far: {self.summary()}")

    def judge(self, totals: Totals) -> None:
        """Count what all ranks saw since the last call.

        Raises:
            DataError: more than the allowed share was skipped.
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
                f"data.max_skipped_share ({self._max_share}) allows. Repair the data or raise the share. "
                f"The last ones:\n{listed}"
            )

    def summary(self) -> str:
        """Return how many samples were skipped so far, by reason."""
        return ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
