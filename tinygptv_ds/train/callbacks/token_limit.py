"""Micro-batches above `train.max_tokens`, which occur because a step is packed by estimated lengths."""

from __future__ import annotations

from collections.abc import Sequence

from tinygptv_ds.data.loader.batch import MicroBatch
from tinygptv_ds.log import LOGGER
from tinygptv_ds.train.callbacks.callback import Callback, LogRecord


class TokenLimit(Callback):
    """Warns of this rank's micro-batches that came out longer than the limit.

    Settings: `train.max_tokens`. Metrics: none.
    """

    def __init__(self, max_tokens: int | None) -> None:
        self._max_tokens = max_tokens
        self._longest, self._count = 0, 0

    def on_batch(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Measure this rank's micro-batches of a step."""
        if self._max_tokens is not None:
            lengths = [len(micro_batch.batch.input_ids) for micro_batch in micro_batches]
            self._count += sum(length > self._max_tokens for length in lengths)
            self._longest = max(self._longest, *lengths)

    def on_log(self, record: LogRecord) -> None:
        """Warn of those since the last line."""
        if self._count:
            LOGGER.warning(
                "%d micro-batches of this rank had more than train.max_tokens (%d) tokens, %d at most: texts here take "
                "more tokens than estimated; lower train.max_tokens where memory is short",
                self._count,
                self._max_tokens,
                self._longest,
            )
        self._count = 0
